"""List the caches of a folder in an object store, and filter lists of caches. Imports neither torch nor zarr."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from cache_tools.errors import FormatError, NotFoundError
from cache_tools.home.registry import SUFFIX, Summary, complete_views, manifest_fields, problem_fields
from cache_tools.places import Entry, Place

WORKERS = 8

AnySummary = TypeVar("AnySummary", bound=Summary)


@dataclass(frozen=True, kw_only=True)
class RemoteRecord(Summary):
    """A cache in an object store. `used_s` is when it was last written: its use is not recorded."""

    url: str


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which caches to list; a cache must pass every filter.

    Attributes:
        name, dataset, teacher: must contain this, ignoring case; `*` and `?` are wildcards.
        complete: whether the cache must have every view, or must not.
        larger_than: bytes.
        unused_for_s: last used longer ago than this.
    """

    name: str | None = None
    dataset: str | None = None
    teacher: str | None = None
    complete: bool | None = None
    larger_than: int | None = None
    unused_for_s: float | None = None

    def apply(self, records: Iterable[AnySummary], *, now_s: float | None = None) -> list[AnySummary]:
        """The records that pass, in the order given."""
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
    """The caches directly below a place, by name, or the place itself if it is one. Reads manifests and lists files.

    Raises:
        StorageError: a store that does not answer, or cannot list its files.
    """
    if (single := remote_record(place)) is not None:
        return [single]
    with ThreadPoolExecutor(WORKERS) as pool:
        found = pool.map(remote_record, map(place.child, place.folders()))
        return sorted((record for record in found if record is not None), key=lambda each: (each.name, each.url))


def remote_record(place: Place, entries: Iterable[Entry] | None = None) -> RemoteRecord | None:
    """Describe one cache without reading its arrays; None if there is none.

    Args:
        entries: its files, if they are already listed.
    """
    from cache_tools.places.metadata import manifest_at  # imports pydantic

    manifest, failure = None, dict[str, Any]()
    try:
        manifest = manifest_at(place)
    except NotFoundError:
        return None
    except FormatError as error:
        failure = problem_fields(error)
    files = list(place.entries() if entries is None else entries)
    newest_s = max((entry.modified_s for entry in files), default=0.0)
    common: dict[str, Any] = {
        "size_bytes": sum(entry.size for entry in files),
        "modified_s": newest_s,
        "used_s": newest_s,
    }
    if manifest is None:
        return RemoteRecord(url=str(place), name=place.name.removesuffix(SUFFIX), **failure, **common)
    views = complete_views(commit_names(entry.key for entry in files), manifest)
    return RemoteRecord(url=str(place), **manifest_fields(manifest), views_done=len(views), **common)


def commit_names(keys: Iterable[str]) -> list[str]:
    """Names of the commit files among the files of a cache."""
    from cache_tools.format.commits import COMMITS  # imports pydantic

    folder = f"{COMMITS}/"
    return [key.removeprefix(folder) for key in keys if key.startswith(folder)]


def _matches(pattern: str | None, text: str) -> bool:
    return pattern is None or fnmatch.fnmatchcase(text.lower(), f"*{pattern.lower()}*")
