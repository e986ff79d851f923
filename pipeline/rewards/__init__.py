"""Who scores a rollout, turn by turn."""
