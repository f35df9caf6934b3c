"""The cache home: find, list, stage and prune caches."""
