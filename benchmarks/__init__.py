"""Measurements: each module times both sides in one run and writes a JSON beside its peers."""
