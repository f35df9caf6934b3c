"""Which caches to list: filters, and the caches of a folder in an object store. Imports neither torch nor zarr."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cache_tools.config import Frozen
from cache_tools.errors import FormatError, NotFoundError
from cache_tools.format import commits
from cache_tools.home.registry import SUFFIX, Summary, complete_views, summary, trouble
from cache_tools.places import Entry, Place
from cache_tools.places.metadata import manifest_at

WORKERS = 8

Listed = TypeVar("Listed", bound=Summary)


class RemoteRecord(Summary):
    """A cache in an object store. Nobody there notes when it is used: `used_s` is when it was written."""

    url: str


class Filters(Frozen):
    """What to list; everything given must hold.

    Attributes:
        name, dataset, teacher: a part of it, in upper or lower case; `*` and `?` stand for anything.
        complete: whether every view is there.
        larger_than: bytes.
        unused_for_s: last used longer ago than this.
    """

    name: str | None = None
    dataset: str | None = None
    teacher: str | None = None
    complete: bool | None = None
    larger_than: int | None = None
    unused_for_s: float | None = None

    def of(self, records: Iterable[Listed], *, now_s: float | None = None) -> list[Listed]:
        """The records that pass, in their order."""
        now_s = time.time() if now_s is None else now_s
        return [record for record in records if self._passes(record, now_s)]

    def _passes(self, record: Summary, now_s: float) -> bool:
        return (
            _matches(self.name, record.name)
            and _matches(self.dataset, record.dataset)
            and _matches(self.teacher, record.teacher)
            and (self.complete is None or self.complete == record.complete)
            and (self.larger_than is None or record.size_bytes > self.larger_than)
            and (self.unused_for_s is None or now_s - record.used_s > self.unused_for_s)
        )


def list_remote(place: Place) -> list[RemoteRecord]:
    """The caches directly below a place, by name, or the one that it is. Reads manifests and lists files.

    Raises:
        StorageError: a store that does not answer, or does not list.
    """
    if (single := remote_record(place)) is not None:
        return [single]
    with ThreadPoolExecutor(WORKERS) as pool:
        found = pool.map(remote_record, map(place.child, place.folders()))
        return sorted((record for record in found if record is not None), key=lambda each: (each.name, each.url))


def remote_record(place: Place, entries: Iterable[Entry] | None = None) -> RemoteRecord | None:
    """What there is to know about one cache without reading its arrays; None if there is none.

    Args:
        entries: its files, if they are listed already.
    """
    manifest, failure = None, dict[str, str | None]()
    try:
        manifest = manifest_at(place)
    except NotFoundError:
        return None
    except FormatError as error:
        failure = trouble(error)
    files = list(place.entries() if entries is None else entries)
    times = max((entry.modified_s for entry in files), default=0.0)
    common = {"size_bytes": sum(entry.size for entry in files), "modified_s": times, "used_s": times}
    if manifest is None:
        return RemoteRecord(url=str(place), name=place.name.removesuffix(SUFFIX), **failure, **common)
    done = len(complete_views(commit_names(entry.key for entry in files), manifest))
    return RemoteRecord(url=str(place), **summary(manifest), views_done=done, **common)


def commit_names(keys: Iterable[str]) -> list[str]:
    """Names of the commit files among the files of a cache."""
    folder = f"{commits.COMMITS}/"
    return [key.removeprefix(folder) for key in keys if key.startswith(folder)]


def _matches(pattern: str | None, text: str) -> bool:
    return pattern is None or fnmatch.fnmatchcase(text.lower(), f"*{pattern.lower()}*")
