"""The zarr group of a cache on a local disk: create, read, write."""
