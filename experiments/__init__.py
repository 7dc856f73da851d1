"""The sentences: compose, run, record, plot. Run from the repository, not installed."""
