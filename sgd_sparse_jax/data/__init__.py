"""Arrays in, batches out."""
