"""The cache home: find caches by path, name or fingerprint. Reads manifests only; imports neither torch nor zarr."""

from __future__ import annotations

import difflib
import os
import re
import stat
import string
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_tools.console import storage_error
from cache_tools.errors import (
    CacheError,
    NotFoundError,
    RecipeError,
    StorageError,
    UnknownFormatError,
    UnsafeFileError,
    printable,
)
from cache_tools.files import HOME_VARIABLE as HOME_VARIABLE
from cache_tools.files import SafeFolder, find_leftovers, remove_leftover
from cache_tools.files import cache_home as cache_home
from cache_tools.home.origin import OriginRecord, read_origin
from cache_tools.home.sizes import FIELDS, Sizes, size_and_time
from cache_tools.places import is_remote, local_path

if TYPE_CHECKING:
    from cache_tools.format.manifest import Manifest

SUFFIX = ".zarr"
MIN_PREFIX = 4
CLOCK_DIFFERENCE_S = 300.0  # by which the clock of a file server may be ahead of ours


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What `cache-tools ls` shows of a cache.

    Attributes:
        views_dropped: the first views of a rolling cache, which are gone for good.
        problem: why the cache cannot be opened; then most other fields are empty.
        unknown: why a cache that cannot be opened may still be sound; None if it is damaged.
    """

    name: str
    fingerprint: str = ""
    dataset: str = ""
    teacher: str = ""
    clip: str = ""
    views_done: int = 0
    views_total: int = 0
    views_dropped: int = 0
    size_bytes: int = 0
    modified_s: float = 0.0
    used_s: float = 0.0
    problem: str | None = None
    unknown: str | None = None

    @property
    def complete(self) -> bool:
        return self.problem is None and self.views_done == self.views_total

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class CacheRecord(Summary):
    """A cache in a folder. `origin` is the URL that it mirrors: then it has the views that were needed so far."""

    path: Path
    origin: str | None = None


def cache_path(name: str, fingerprint: str) -> Path:
    """The path of a recipe's cache in the cache home; every recipe has its own.

    Raises:
        RecipeError: a name that is not a plain file name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RecipeError("bad cache name", where=name, expected="letters, digits, dots, dashes and underscores")
    return cache_home() / f"{name}-{fingerprint[:12]}{SUFFIX}"


def resolve(reference: str | Path) -> Path:
    """The folder of a cache: the reference itself if it is a path, else what `find` finds.

    Raises:
        NotFoundError: nothing, or several caches; a URL.
    """
    if is_remote(reference):
        raise NotFoundError(
            "this needs a cache on a local disk",
            where=reference,
            next_step=f"`cache-tools pull {reference}` brings it into the cache home",
        )
    path = local_path(reference)
    looks_like_path = isinstance(reference, Path) or os.sep in reference or reference.endswith(SUFFIX)
    if looks_like_path or (reference and is_cache(path)):
        if not os.path.exists(path):  # Path.exists raises for names that no file can have
            raise NotFoundError("no cache here", where=path, next_step=_advice(list_caches()))
        return path
    return find(str(reference)).path


def find(reference: str) -> CacheRecord:
    """The cache of the home with this name, fingerprint prefix (four hex digits or more) or `NAME-FINGERPRINT`.

    If several match and exactly one is complete, that one is returned.

    Raises:
        NotFoundError: none matches (the message has similar names), or several (it has their fingerprints).
    """
    caches = list_caches()
    matches = [found for found in caches if found.name == reference] or [
        found for found in caches if _has_prefix(found, reference)
    ]
    complete = [found for found in matches if found.complete]
    if len(matches) == 1 or len(complete) == 1:
        return (complete if len(complete) == 1 else matches)[0]
    if matches:
        listed = ", ".join(
            f"{m.fingerprint[:12] or m.path.name} ({m.views_done}/{m.views_total} views)" for m in matches
        )
        raise NotFoundError(
            "several caches match", where=reference, found=listed, next_step="give more of the fingerprint, or the path"
        )
    near = difflib.get_close_matches(reference, sorted({found.name for found in caches}), n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}; otherwise " if near else ""
    advice += (
        "run `cache-tools ls`" if _is_hex(reference) else "`cache-tools ls` lists the caches, `build-cache` makes more"
    )
    raise NotFoundError(
        "no such cache",
        where=reference,
        expected=f"a path, or a name or fingerprint in {cache_home()}",
        next_step=advice,
    )


def is_cache(path: Path) -> bool:
    """Whether `path` is a folder with a zarr.json: reading it shows whether that is one of a cache."""
    try:
        status = SafeFolder(path).status("zarr.json")
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return False
    return status is not None and not stat.S_ISDIR(status.st_mode)


def list_caches(home: Path | None = None, *, indexed: bool = False) -> list[CacheRecord]:
    """Every cache of the home or another folder, by name, then path; also half-built and damaged ones.

    Of a folder that is a cache itself, only that cache.

    Args:
        indexed: believe the index about caches that have not changed, without reading their manifests. Only for the
            eyes: what the user chooses or removes is read.

    Raises:
        NotFoundError: no such folder. A cache home that does not exist yet is empty.
    """
    if home is not None and not os.path.isdir(home):
        raise NotFoundError("no such folder", where=home, next_step="check the path")
    home = home or cache_home()
    if is_cache(home):
        return [read_record(home)]
    try:
        named = (path for path in home.glob(f"*{SUFFIX}") if not path.name.startswith("."))
        folders = sorted(path for path in named if not _is_empty(path))
    except OSError as error:
        raise storage_error(error) from error
    with Sizes(home) as sizes:
        records = [_indexed_record(path, sizes, trusted=indexed) for path in folders]
    return sorted(records, key=lambda found: (found.name, str(found.path)))


def read_record(path: Path, size: tuple[int, float] | None = None) -> CacheRecord:
    """Describe one cache without reading its arrays.

    Args:
        size: its `size_and_time`, if known.
    """
    from cache_tools.store.group import read_manifest  # imports pydantic

    size_bytes, modified_s = size_and_time(path) if size is None else size
    try:
        origin, manifest = read_origin(path), read_manifest(path)
        fields = manifest_fields(manifest) | {"views_done": len(read_complete_views(path, manifest))}
    except CacheError as error:
        name = printable(re.sub(r"-[0-9a-f]{12}$", "", path.name.removesuffix(SUFFIX)))
        return CacheRecord(
            path=path,
            name=name,
            size_bytes=size_bytes,
            modified_s=modified_s,
            used_s=_last_use_s(path, modified_s),
            **problem_fields(error),
        )
    return _record(path, size_bytes, modified_s, origin, fields)


def _record(
    path: Path, size_bytes: int, modified_s: float, origin: OriginRecord | None, fields: Mapping[str, Any]
) -> CacheRecord:
    """A cache that can be opened; `fields` are those of the index."""
    return CacheRecord(
        path=path,
        origin=origin.url if origin is not None and origin.is_mirror else None,
        size_bytes=size_bytes,
        modified_s=modified_s,
        used_s=_last_use_s(path, modified_s),
        **fields,
    )


def _indexed_record(path: Path, sizes: Sizes, *, trusted: bool) -> CacheRecord:
    """The record of a cache, which the index remembers."""
    size_bytes, modified_s = size = sizes.of(path)
    if trusted and (fields := sizes.fields_of(path)) is not None:
        with suppress(UnsafeFileError):
            return _record(path, size_bytes, modified_s, read_origin(path), fields)
    record = read_record(path, size)
    if record.problem is None:
        sizes.remember(path, {name: getattr(record, name) for name in FIELDS})
    return record


def problem_fields(error: CacheError) -> dict[str, Any]:
    """The fields of `Summary` that say why a cache cannot be opened."""
    unknown = None
    if isinstance(error, UnknownFormatError):
        unknown = "written by another version of teacher-cache"
    elif isinstance(error, StorageError):
        unknown = "it cannot be read right now"
    return {"problem": str(error), "unknown": unknown}


def manifest_fields(manifest: Manifest) -> dict[str, Any]:
    """The fields of `Summary` that the manifest determines."""
    recipe = manifest.recipe
    return {
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "dataset": f"{recipe.dataset.name}/{recipe.dataset.split}",
        "teacher": " + ".join(teacher.architecture for teacher in recipe.teachers),
        "clip": " + ".join(clip.architecture for clip in recipe.clips),
        "views_total": manifest.num_views,
        "views_dropped": manifest.num_dropped,
    }


def mark_used(path: Path) -> None:
    """Record that a cache is used now, for `ls` and `prune`. Does nothing where the home is read-only.

    The file is replaced, not touched: it may be a hard link to a file of somebody else.
    """
    try:
        file = used_file(path)
        SafeFolder(file.parent).put(file.name, b"", durable=False)
        for leftover in find_leftovers(file.parent, f"{file.name}."):  # of a command that was killed here
            remove_leftover(leftover)
    except OSError:  # on a read-only share, its owner decides what is pruned
        return


def used_file(path: Path) -> Path:
    """The file whose modification time is the last use of a cache; it lies beside the cache, as `origin_file` does."""
    return path.absolute().with_name(f".{path.name}.used")


def read_complete_views(path: Path, manifest: Manifest) -> list[int]:
    """The complete views of a cache, from the names of its commit files."""
    from cache_tools.format.commits import COMMITS  # imports pydantic

    try:
        names = SafeFolder(path).names(COMMITS)
    except OSError:
        return []
    return complete_views(names, manifest)


def complete_views(names: Iterable[str], manifest: Manifest) -> list[int]:
    """The views whose every block has one of these commit files."""
    from cache_tools.format.commits import parse_file_names  # imports pydantic

    counts = Counter(view for view, _ in parse_file_names(names, manifest))
    return sorted(view for view, count in counts.items() if count == manifest.num_blocks)


def _last_use_s(path: Path, modified_s: float) -> float:
    """When a cache was last used or written. If only times in the future tell, from a clock that was set back: now."""
    now_s = time.time() + CLOCK_DIFFERENCE_S
    try:
        used_s = used_file(path).lstat().st_mtime
    except OSError:
        used_s = 0.0
    if used_s > now_s or (modified_s > now_s and not used_s):
        mark_used(path)
        return time.time()
    return used_s if modified_s > now_s else max(modified_s, used_s)


def _is_empty(folder: Path) -> bool:
    """Whether a folder is empty: a process that is about to copy a cache may just have created it."""
    try:
        with os.scandir(folder) as found:
            return next(found, None) is None
    except OSError:
        return False


def _has_prefix(found: CacheRecord, reference: str) -> bool:
    if _is_hex(reference):
        return found.fingerprint.startswith(reference.lower())
    stem = f"{found.name}-"
    return (
        reference.startswith(stem)
        and _is_hex(reference.removeprefix(stem))
        and found.fingerprint.startswith(reference.removeprefix(stem).lower())
    )


def _is_hex(text: str) -> bool:
    return len(text) >= MIN_PREFIX and set(text) <= set(string.hexdigits)


def _advice(caches: list[CacheRecord]) -> str:
    names = sorted({found.name for found in caches})
    return (
        f"give another path, or a name: {', '.join(names)}"
        if names
        else "give another path, or run `build-cache` first"
    )
