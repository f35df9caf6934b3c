"""Train the trials of a sweep on a Ray cluster."""
