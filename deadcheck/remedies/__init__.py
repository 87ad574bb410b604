"""Changes to a model that are meant to help."""
