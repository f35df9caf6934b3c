"""The sizes of caches, kept in an index: looking at every file of a cache home takes minutes on a network disk.

Files of a cache are created and replaced by renaming, which changes the time of their folder. So a cache's size is
valid as long as the times of its folders are the same. The index is a hidden file of the home.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from cache_tools.errors import FormatError, UnsafeFileError
from cache_tools.files import MAX_METADATA_BYTES, SafeFolder

INDEX = ".sizes.json"
SETTLED_S = 2.0  # a folder that changed this recently may change again within the resolution of its time

_Index = dict[str, tuple[str, int, float]]  # name of the cache → digest of its folders' times, bytes, newest file (s)


class Sizes:
    """Sizes of the caches in a home. Use as a context manager: leaving it writes the index if it has changed."""

    def __init__(self, home: Path) -> None:
        self._home, self._used, self._changed = SafeFolder(home), _Index(), False
        try:
            self._known = TypeAdapter(_Index).validate_json(self._home.read_bytes(INDEX, MAX_METADATA_BYTES))
        except UnsafeFileError:
            raise
        except (OSError, ValidationError, FormatError):
            self._known = _Index()

    def __enter__(self) -> Sizes:
        return self

    def __exit__(self, *error: object) -> None:
        if self._changed or self._used.keys() != self._known.keys():
            self._write()

    def of(self, path: Path) -> tuple[int, float]:
        """`size_and_time` of a cache in this home."""
        times, newest_s = _folder_times(path)
        if (known := self._known.get(path.name)) is not None and known[0] == times:
            self._used[path.name] = known
            return known[1:]
        size_bytes, modified_s = size_and_time(path)
        if time.time() - newest_s > SETTLED_S:
            self._used[path.name], self._changed = (times, size_bytes, modified_s), True
        return size_bytes, modified_s

    def _write(self) -> None:
        with suppress(OSError):  # a read-only home: the sizes are computed again next time
            self._home.remove_partials()
            self._home.put(INDEX, json.dumps(self._used).encode(), durable=False)


def size_and_time(path: Path) -> tuple[int, float]:
    """Bytes of all files of a folder, and when the newest was written; 0 for what cannot be read."""
    total, newest, folders = 0, 0.0, [str(path)]
    while folders:
        with suppress(OSError), os.scandir(folders.pop()) as found:
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    continue
                with suppress(OSError):  # a builder has just renamed the file
                    status = entry.stat(follow_symlinks=False)
                    total, newest = total + status.st_size, max(newest, status.st_mtime)
    return total, newest


def _folder_times(path: Path) -> tuple[str, float]:
    """A digest of the times of a cache's folders, and the latest of the times (s)."""
    times: dict[str, int] = {}
    with suppress(OSError):
        times[""] = path.stat().st_mtime_ns
        with os.scandir(path) as found:
            folders = (entry for entry in found if entry.is_dir(follow_symlinks=False))
            times |= {entry.name: entry.stat(follow_symlinks=False).st_mtime_ns for entry in folders}
    text = json.dumps(times, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), max(times.values(), default=0) / 1e9
