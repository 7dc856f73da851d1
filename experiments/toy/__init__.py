"""Toy problems, their flags, single runs, and ensembles of seeds."""
