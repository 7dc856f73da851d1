"""Measurements: each module times both sides in one run and writes its results as JSON."""
