"""Who answers the policy between two of its turns. A new environment is a file and a line here.

Each value is `module:function`; the function takes (config, user) and returns an Environment. See
`base.py` for the seam.
"""

ENVIRONMENTS = {
    "simulated_user": "pipeline.environments.simulated_user:build",
    "fixed_user": "pipeline.environments.fixed_user:build",
    "guessing_game": "pipeline.environments.guessing_game:build",
}

NEEDS_USER_MODEL = {"simulated_user"}
"""The environments for which a stage loads a user model."""
