"""Who answers the policy between two of its turns."""
