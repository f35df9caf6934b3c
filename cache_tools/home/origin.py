"""Which URL a mirror was staged from: a small file beside the mirror. Imports neither torch nor zarr."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import NonNegativeInt, ValidationError

from cache_tools.config import Frozen
from cache_tools.errors import FormatError
from cache_tools.files import MAX_METADATA_BYTES, check_file, put_durably


class OriginRecord(Frozen):
    """The state of the remote cache when the store was last asked.

    Attributes:
        url: of the cache.
        fingerprint: of the cache that was there.
        views: number of views in its manifest; 0 if the home already had all of them, so that nothing is staged.
        complete: whether all of these were committed; a commit is never taken back.
    """

    url: str
    fingerprint: str
    views: NonNegativeInt
    complete: bool = False

    @property
    def is_mirror(self) -> bool:
        """Whether views are staged from the URL; otherwise a complete local cache is used in its place."""
        return self.views > 0


def origin_file(path: Path) -> Path:
    """The file of the record, beside the cache: other zarr readers warn of unknown files in it."""
    return path.absolute().with_name(f".{path.name}.origin")


def read_origin(path: Path) -> OriginRecord | None:
    """The record beside a cache; None if it has none, or one that cannot be read."""
    try:
        check_file(origin_file(path), MAX_METADATA_BYTES)
        return OriginRecord.model_validate_json(origin_file(path).read_bytes())
    except (OSError, ValidationError, FormatError):
        return None


def write_origin(path: Path, record: OriginRecord) -> None:
    """Write the record beside a cache.

    Raises:
        OSError: a full or read-only disk.
    """
    put_durably(origin_file(path), json.dumps(record.model_dump(mode="json"), indent=2).encode())


def mirrors_of(url: str, home: Path) -> list[tuple[Path, OriginRecord]]:
    """The caches of a home that mirror a URL or are used in its place, the most recently staged first."""
    found = []
    for file in home.glob(".*.origin"):
        path = home / file.name.removeprefix(".").removesuffix(".origin")
        record = read_origin(path)
        if record is not None and record.url == url and (path / "zarr.json").is_file():
            found.append((file.stat().st_mtime, path, record))
    return [(path, record) for _, path, record in sorted(found, key=lambda each: each[0], reverse=True)]
