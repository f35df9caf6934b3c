"""Verify and repair caches: bytes, images, numbers."""
