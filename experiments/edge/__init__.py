"""Runs at the edge of stability: problems, trajectories, gauges, and studies of them."""
