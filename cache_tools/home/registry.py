"""The cache home: find caches by path, name or fingerprint. Reads manifests only; imports neither torch nor zarr."""

from __future__ import annotations

import difflib
import os
import re
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cache_tools.config import Frozen
from cache_tools.console import storage_error
from cache_tools.errors import CacheError, NotFoundError, RecipeError, StorageError, UnknownFormatError, printable
from cache_tools.format import commits
from cache_tools.format.manifest import Manifest
from cache_tools.home.origin import read_origin
from cache_tools.home.sizes import Sizes, size_and_time
from cache_tools.places import is_remote, local_path
from cache_tools.store.group import read_manifest

HOME_VARIABLE = "TEACHER_CACHE_HOME"
SUFFIX = ".zarr"
MIN_PREFIX = 4


class Summary(Frozen):
    """What `cache-tools ls` says of a cache.

    One that cannot be opened has a `problem` and little else: it is damaged, unless `unknown` says why it may be sound.
    """

    name: str
    fingerprint: str = ""
    dataset: str = ""
    teacher: str = ""
    clip: str = ""
    views_done: int = 0
    views_total: int = 0
    size_bytes: int = 0
    modified_s: float = 0.0
    used_s: float = 0.0
    problem: str | None = None
    unknown: str | None = None

    @property
    def complete(self) -> bool:
        return self.problem is None and self.views_done == self.views_total


class CacheRecord(Summary):
    """A cache in a folder. `origin` is the URL that it is a mirror of: it has the views that were needed so far."""

    path: Path
    origin: str | None = None


def cache_home() -> Path:
    """$TEACHER_CACHE_HOME, or ~/.cache/teacher-cache."""
    return Path(os.environ.get(HOME_VARIABLE) or "~/.cache/teacher-cache").expanduser()


def cache_path(name: str, fingerprint: str) -> Path:
    """Where the cache of a recipe lives: the same recipe finds it again, another recipe never does.

    Raises:
        RecipeError: a name that is not a plain file name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RecipeError("bad cache name", where=name, expected="letters, digits, dots, dashes and underscores")
    return cache_home() / f"{name}-{fingerprint[:12]}{SUFFIX}"


def is_cache(path: Path) -> bool:
    """Whether something that calls itself a zarr group is at `path`; an empty folder is nothing."""
    return os.path.isfile(path / "zarr.json")


def list_caches(home: Path | None = None) -> list[CacheRecord]:
    """Every cache of the home or another folder, by name, then path; also half-built and damaged ones.

    A folder that is a cache itself is the only one.

    Raises:
        NotFoundError: no such folder; a home that is not there yet has no caches.
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
        records = [read_record(path, sizes.of(path)) for path in folders]
    return sorted(records, key=lambda found: (found.name, str(found.path)))


def read_record(path: Path, size: tuple[int, float] | None = None) -> CacheRecord:
    """What there is to know about one cache without reading its arrays.

    Args:
        size: its `size_and_time`, if that is known.
    """
    size_bytes, modified_s = size_and_time(path) if size is None else size
    origin = read_origin(path)
    try:
        manifest = read_manifest(path)
    except CacheError as error:
        name = printable(re.sub(r"-[0-9a-f]{12}$", "", path.name.removesuffix(SUFFIX)))
        times = {"modified_s": modified_s, "used_s": max(modified_s, _used_s(path))}
        return CacheRecord(path=path, name=name, size_bytes=size_bytes, **trouble(error), **times)
    return CacheRecord(
        path=path,
        origin=origin.url if origin is not None and origin.of_a_mirror else None,
        **summary(manifest),
        views_done=len(views_done(path, manifest)),
        size_bytes=size_bytes,
        modified_s=modified_s,
        used_s=max(modified_s, _used_s(path)),
    )


def trouble(error: CacheError) -> dict[str, str | None]:
    """The fields of `Summary` that say why a cache cannot be opened."""
    unknown = None
    if isinstance(error, UnknownFormatError):
        unknown = "written by another version of teacher-cache"
    elif isinstance(error, StorageError):
        unknown = "it cannot be read right now"
    return {"problem": str(error), "unknown": unknown}


def summary(manifest: Manifest) -> dict[str, Any]:
    """The fields of `Summary` that the manifest determines."""
    recipe = manifest.recipe
    return {
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "dataset": f"{recipe.dataset.name}/{recipe.dataset.split}",
        "teacher": " + ".join(teacher.architecture for teacher in recipe.teachers),
        "clip": " + ".join(clip.architecture for clip in recipe.clips),
        "views_total": manifest.num_views,
    }


def mark_used(path: Path) -> None:
    """Remember that a cache was used now, for `ls` and `prune`; nothing happens where that cannot be written."""
    try:
        used_file(path).touch()
    except OSError:  # a read-only share: its owner decides what is pruned
        return


def used_file(path: Path) -> Path:
    """Its time says when a cache was used last. Beside the cache: other zarr readers warn of strange files in it."""
    return path.absolute().with_name(f".{path.name}.used")


def _used_s(path: Path) -> float:
    try:
        return used_file(path).stat().st_mtime
    except OSError:
        return 0.0


def views_done(path: Path, manifest: Manifest) -> list[int]:
    """Complete views, counted from the names of the commit files."""
    try:
        names = os.listdir(path / commits.COMMITS)
    except OSError:
        return []
    return complete_views(names, manifest)


def complete_views(names: Iterable[str], manifest: Manifest) -> list[int]:
    """The views of which every block has one of these commit files."""
    counts = Counter(view for view, _ in commits.parse_file_names(names, manifest))
    return sorted(view for view, count in counts.items() if count == manifest.num_blocks)


def resolve(reference: str | Path) -> Path:
    """The folder a reference means: a path, or what `find` finds.

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
        if not os.path.exists(path):  # unlike Path.exists it has no exception for names that cannot be
            raise NotFoundError("no cache here", where=path, next_step=_known(list_caches()))
        return path
    return find(str(reference)).path


def find(reference: str) -> CacheRecord:
    """The cache of the home with this name, fingerprint prefix (four hex digits or more) or `NAME-FINGERPRINT`.

    Of several, the only complete one is meant.

    Raises:
        NotFoundError: none, with near names; or several, with their fingerprints.
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
    build = (
        "run `cache-tools ls`"
        if _is_hex(reference)
        else "`cache-tools ls` lists what is there, `build-cache` makes more"
    )
    raise NotFoundError(
        "no such cache",
        where=reference,
        expected=f"a path, or a name or fingerprint in {cache_home()}",
        next_step=advice + build,
    )


def _is_empty(folder: Path) -> bool:
    """Whether nothing is there yet: whoever brings a cache may have made just its folder."""
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


def _known(caches: list[CacheRecord]) -> str:
    names = sorted({found.name for found in caches})
    return (
        f"give another path, or a name: {', '.join(names)}"
        if names
        else "give another path, or run `build-cache` first"
    )
