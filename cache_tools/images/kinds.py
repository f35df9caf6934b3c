"""Which source reads what is at a place: a folder of class folders, a list, tar shards, a Hugging Face data set."""

from __future__ import annotations

from pathlib import Path

from cache_tools.images.hf_layout import hf_marker
from cache_tools.images.shard_files import has_shards, is_pattern, local_shards
from cache_tools.images.sources import SOURCES
from cache_tools.storage import remote_url
from cache_tools.system.arguments import expand_user


def source_at(place: Path, expected: str) -> str:
    """The name of the source that reads a place, told by its files; `expected` if that reads it too or nothing does."""
    if remote_url(place) is not None or is_pattern(place):
        return "webdataset"
    path = expand_user(place)
    ending = path.suffix.lower().removeprefix(".")
    if ending in {"csv", "parquet"} and path.is_file():
        return ending
    if not path.is_dir() or (expected in {"csv", "parquet"} and any(path.glob(f"*.{expected}"))):
        return expected
    if has_shards(path) or (expected == "webdataset" and any(local_shards(path))):
        return "webdataset"
    if expected in SOURCES and SOURCES[expected].is_named:
        return expected
    if hf_marker(path) is not None:
        return "hf"
    return "folder" if any(each.is_dir() for each in path.iterdir()) else expected
