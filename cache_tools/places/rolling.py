"""Drop views of a cache at a place, here or in an object store (see `format.rolling`).

The record is written first, then the commits of the views are removed, and their chunks last. A process that is killed
in between leaves files of dropped views, which the next call removes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from cache_tools.files import MAX_METADATA_BYTES
from cache_tools.format import commits
from cache_tools.format.arrays import target_arrays
from cache_tools.format.manifest import Manifest
from cache_tools.format.rolling import ROLLING_KEY, Rolling
from cache_tools.format.stored import parse_group
from cache_tools.places import Entry, Place
from cache_tools.places.arrays import GROUP

_WORKERS = 8


def record_rolling(place: Place, rolling: Rolling) -> None:
    """Store the state of a rolling cache. Call it only while no other process changes the manifest (`growing`).

    Raises:
        FormatError: a damaged manifest.
        StorageError: storage that is full, read-only or unreachable.
    """
    group = json.loads(place.read(GROUP, MAX_METADATA_BYTES))
    parse_group(group["attributes"], where=str(place))
    group["attributes"][ROLLING_KEY] = rolling.model_dump(mode="json")
    place.put(GROUP, json.dumps(group, indent=2).encode())


def remove_dropped(place: Place, manifest: Manifest, dropped: int) -> None:
    """Remove the files of views 0 … dropped − 1, the commits first."""
    remove_views(place, manifest, lambda view: view < dropped)


def remove_views(place: Place, manifest: Manifest, chosen: Callable[[int], bool]) -> None:
    """Remove the files of some views, the commits first."""
    with ThreadPoolExecutor(_WORKERS) as pool:
        for name in (commits.COMMITS, *(spec.name for spec in target_arrays(manifest.recipe, manifest.block_rows))):
            keys = (entry.key for view, entry in files_of_views(place, name) if chosen(view))
            list(pool.map(lambda key: place.delete([key]), keys))


def files_of_views(place: Place, array: str) -> Iterator[tuple[int, Entry]]:
    """The chunks of an array of targets, or of the commits, with the view of each."""
    for entry in place.entries(array):
        chunk = commits.parse_file_name(entry.key.rpartition("/")[2])  # chunks of all arrays are named as commits are
        if chunk is not None:
            yield chunk.view, entry
