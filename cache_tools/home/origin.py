"""Which URL a mirror was staged from: a small file beside the mirror. Imports neither torch nor zarr."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_tools.errors import FormatError, RecipeError, UnsafeFileError
from cache_tools.files import MAX_METADATA_BYTES, SafeFolder


@dataclass(frozen=True, kw_only=True)
class OriginRecord:
    """The state of the remote cache when the store was last asked.

    Attributes:
        url: of the cache.
        fingerprint: of the cache that was there.
        views: number of views in its manifest; 0 if the home already had all of them, so that nothing is staged.
        complete: whether all of these were committed; a commit is never taken back.
    """

    url: str
    fingerprint: str
    views: int
    complete: bool = False

    @property
    def is_mirror(self) -> bool:
        """Whether views are staged from the URL; otherwise a complete local cache is used in its place."""
        return self.views > 0


def origin_file(path: Path) -> Path:
    """The file of the record, beside the cache: other zarr readers warn of unknown files in it."""
    return path.absolute().with_name(f".{path.name}.origin")


def read_origin(path: Path) -> OriginRecord | None:
    """The record beside a cache; None if it has none, or one that cannot be read.

    Raises:
        UnsafeFileError: a link or a pipe is in its place.
    """
    file = origin_file(path)
    try:
        return _parse(json.loads(SafeFolder(file.parent).read_bytes(file.name, MAX_METADATA_BYTES)))
    except UnsafeFileError:
        raise
    except (OSError, ValueError, TypeError, RecursionError, FormatError):
        return None


def _parse(data: Any) -> OriginRecord:
    """The record in the JSON of a file. Raises TypeError or ValueError for anything else."""
    record = OriginRecord(**data)
    types = {name: type(value) for name, value in asdict(record).items()}
    if types != {"url": str, "fingerprint": str, "views": int, "complete": bool} or record.views < 0:
        raise ValueError("not a record of an origin")
    return record


def write_origin(path: Path, record: OriginRecord) -> None:
    """Write the record beside a cache.

    Raises:
        OSError: a full or read-only disk.
        UnsafeFileError: a link or a pipe is in its place.
    """
    file = origin_file(path)
    SafeFolder(file.parent).put(file.name, json.dumps(asdict(record), indent=2).encode())


def budget_is_refused(where: str, reference: object) -> RecipeError:
    """The error for a stage budget of a cache that is read where it is."""
    return RecipeError(
        "a stage budget is for a cache in an object store, whose views come to this disk",
        where=where,
        expected="the URL of a cache, such as s3://bucket/caches/my.zarr",
        found=reference,
        next_step="leave out --stage-budget: a local cache is read where it is",
    )


def mirrors_of(url: str, home: Path) -> list[tuple[Path, OriginRecord]]:
    """The caches of a home that mirror a URL or are used in its place, the most recently staged first."""
    found = []
    with suppress(FileNotFoundError, NotADirectoryError):
        folder = SafeFolder(home)
        for entry in folder.entries():
            if not (entry.is_file and entry.name.startswith(".") and entry.name.endswith(".origin")):
                continue
            path = home / entry.name.removeprefix(".").removesuffix(".origin")
            record = read_origin(path)
            if record is not None and record.url == url and SafeFolder(path).is_file("zarr.json"):
                found.append((folder.age_s(entry.name), path, record))
    return [(path, record) for _, path, record in sorted(found, key=lambda each: each[0])]
