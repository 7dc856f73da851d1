"""Benchmarks: each module times this library and baselines in one run, and writes JSON."""
