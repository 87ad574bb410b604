"""Replacing activations, each kind of model in its own way."""
