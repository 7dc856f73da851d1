"""Runs that train an image classifier: flags, setup, training, metrics, curves."""
