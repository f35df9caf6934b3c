"""Build a cache on a Ray cluster."""
