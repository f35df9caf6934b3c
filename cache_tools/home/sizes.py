"""What `cache-tools ls` shows of the caches of a home, kept in an index.

Looking at every file of a home takes minutes on a network disk, and checking manifests needs pydantic, whose import and
models take longer than the rest of `ls`. Files of a cache are created and replaced by renaming, which changes the time
of their folder. So what the index says is valid as long as the times of the cache's folders and the status of its
zarr.json are the same. The index is a hidden file of the home.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from cache_tools.errors import FormatError, UnsafeFileError
from cache_tools.files import MAX_METADATA_BYTES, SafeFolder

INDEX = ".sizes.json"
VERSION = 2  # raise it when a manifest that was sound becomes one that is refused, or the other way round
SETTLED_S = 2.0  # a folder that changed this recently may change again within the resolution of its time

# What the index has of a sound manifest and its commits: fields of `registry.Summary`.
FIELDS: dict[str, type] = {
    "name": str,
    "fingerprint": str,
    "dataset": str,
    "teacher": str,
    "clip": str,
    "views_done": int,
    "views_total": int,
    "views_dropped": int,
}
Fields = dict[str, Any]


class _Known(NamedTuple):
    """What the index has of a cache. `times` is a digest, `modified_s` when its newest file was written."""

    times: str
    size_bytes: int
    modified_s: float
    fields: Fields | None


class Sizes:
    """Sizes and fields of the caches in a home. As a context manager; leaving it writes the index if it has changed."""

    def __init__(self, home: Path) -> None:
        self._home, self._used, self._changed = SafeFolder(home), dict[str, _Known](), False
        try:
            self._known = _parse(self._home.read_bytes(INDEX, MAX_METADATA_BYTES))
        except UnsafeFileError:
            raise
        except (OSError, FormatError):
            self._known = {}

    def __enter__(self) -> Sizes:
        return self

    def __exit__(self, *error: object) -> None:
        if self._changed or self._used.keys() != self._known.keys():
            self._write()

    def of(self, path: Path) -> tuple[int, float]:
        """`size_and_time` of a cache in this home."""
        times, newest_s = _times(path)
        if (known := self._known.get(path.name)) is not None and known.times == times:
            self._used[path.name] = known
            return known.size_bytes, known.modified_s
        size_bytes, modified_s = size_and_time(path)
        if time.time() - newest_s > SETTLED_S:
            self._used[path.name], self._changed = _Known(times, size_bytes, modified_s, None), True
        return size_bytes, modified_s

    def fields_of(self, path: Path) -> Fields | None:
        """The fields of a cache that has not changed since they were read. After `of`."""
        known = self._used.get(path.name)
        return None if known is None else known.fields

    def remember(self, path: Path, fields: Fields) -> None:
        """Keep the fields of a cache, which were read after `of`."""
        known = self._used.get(path.name)
        if known is not None and known.fields != fields:
            self._used[path.name], self._changed = known._replace(fields=fields), True

    def _write(self) -> None:
        with suppress(OSError):  # a read-only home: everything is read again next time
            self._home.remove_partials()
            self._home.put(INDEX, json.dumps({"version": VERSION, "caches": self._used}).encode(), durable=False)


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


def _times(path: Path) -> tuple[str, float]:
    """A digest of the times of a cache's folders and of the status of its zarr.json; the latest of the times (s)."""
    times: dict[str, int] = {}
    manifest: tuple[int, ...] = ()
    with suppress(OSError):
        times[""] = path.stat().st_mtime_ns
        with os.scandir(path) as found:
            folders = (entry for entry in found if entry.is_dir(follow_symlinks=False))
            times |= {entry.name: entry.stat(follow_symlinks=False).st_mtime_ns for entry in folders}
        status = (path / "zarr.json").lstat()  # whoever edits it in place changes no folder
        manifest = (status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        times["zarr.json"] = status.st_mtime_ns
    text = json.dumps([times, manifest], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), max(times.values(), default=0) / 1e9


def _parse(data: bytes) -> dict[str, _Known]:
    """The index, or an empty one if anything about it is unusual."""
    try:
        index = json.loads(data)
        if index["version"] != VERSION:
            return {}
        known = {str(name): _Known(*entry) for name, entry in index["caches"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return known if all(map(_is_sound, known.values())) else {}


def _is_sound(known: _Known) -> bool:
    if not (isinstance(known.times, str) and _is_count(known.size_bytes) and isinstance(known.modified_s, float)):
        return False
    if known.fields is None:
        return math.isfinite(known.modified_s)
    return (
        math.isfinite(known.modified_s)
        and isinstance(known.fields, dict)
        and known.fields.keys() == FIELDS.keys()
        and all((_is_text if FIELDS[name] is str else _is_count)(value) for name, value in known.fields.items())
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_text(value: object) -> bool:
    """Whether a value is text that UTF-8 has, not half of a surrogate pair."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value
