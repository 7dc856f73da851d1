"""Ensembles of toy runs: problems, flags, one run, many seeds."""
