"""Helpers that several tests share: tiny caches, runs, servers, processes."""
