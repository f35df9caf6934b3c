"""Caches at places: their arrays, claims on their blocks, copies of them. `cache_tools.storage` has the places."""

from __future__ import annotations

from cache_tools.storage import (
    Entry,
    LocalPlace,
    Place,
    RemotePlace,
    is_remote,
    is_url,
    local_folder,
    local_path,
    open_place,
)

__all__ = [
    "Entry",
    "LocalPlace",
    "Place",
    "RemotePlace",
    "is_remote",
    "is_url",
    "local_folder",
    "local_path",
    "open_place",
]
