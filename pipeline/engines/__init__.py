"""Who speaks: each module wraps one way of getting ids out of a model."""
