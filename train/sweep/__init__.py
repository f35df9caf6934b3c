"""Many students from one cache: grids, searches, successive halving."""
