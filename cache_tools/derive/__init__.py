"""Caches made from other caches, without a teacher pass."""
