"""Caches from and for other tools: import targets that others computed, export a cache for others to read."""
