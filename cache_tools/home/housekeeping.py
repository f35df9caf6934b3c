"""Make room in the cache home: find the caches that rules select, and remove them. Imports neither torch nor zarr."""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from cache_tools.config import Frozen
from cache_tools.console import storage_error
from cache_tools.decoding.pixel_file import FOLDER as PIXELS
from cache_tools.decoding.pixel_file import SUFFIX
from cache_tools.errors import StorageError
from cache_tools.files import PARTIAL, SafeFolder, find_leftovers, remove_leftover, sync_folder
from cache_tools.home.origin import origin_file
from cache_tools.home.registry import CacheRecord, cache_home, is_cache, list_caches, used_file
from cache_tools.home.sizes import size_and_time
from cache_tools.home.stage import idle_stages
from cache_tools.images.hf import UNPACKED
from cache_tools.images.shard_files import COPIES
from cache_tools.places import LocalPlace
from cache_tools.places.claims import EXPIRE_S, HEARTBEAT_S, claims_place, remove_dead_claims
from cache_tools.places.leases import remove_leases

_COPIES = {UNPACKED: ".arrow", COPIES: ".tar", PIXELS: SUFFIX}  # folder in the cache home → ending
RENEWED_S = HEARTBEAT_S + 5.0  # within this time, a living process renews its claims


class PruneRules(Frozen):
    """Which caches to remove: those that any rule selects.

    Attributes:
        older_than_s: caches last written longer ago than this.
        unused_for_s: caches last trained from or built longer ago than this.
        incomplete: half-built and damaged caches, and partly staged mirrors.
        keep_bytes: after that, the least recently used caches until the home is no larger than this.
    """

    older_than_s: float | None = None
    unused_for_s: float | None = None
    incomplete: bool = False
    keep_bytes: int | None = None


class Candidate(Frozen):
    """A cache that a rule selects, and the reason. `kept_because` is the reason why it is kept nevertheless."""

    record: CacheRecord
    reason: str
    kept_because: str | None = None


class Pruned(Frozen):
    """What `prune` removed, or would remove.

    Attributes:
        candidates: the caches that the rules select, least recently used first.
        leftovers: bytes of each file and folder that killed commands left behind, stages included.
        image_copies: bytes of each copy of images that no command has read for as long as the rules say: images that
            were unpacked from Parquet files (`images.hf`), tar shards of object stores (`images.shard_files`), and
            decoded pixels (`decoding.pixel_file`).
        bytes_left: size of the caches that stay.
    """

    candidates: tuple[Candidate, ...]
    leftovers: dict[Path, int]
    image_copies: dict[Path, int]
    bytes_left: int

    @property
    def removed(self) -> list[Candidate]:
        """The candidates that are not kept."""
        return [candidate for candidate in self.candidates if candidate.kept_because is None]

    @property
    def bytes_freed(self) -> int:
        return sum(candidate.record.size_bytes for candidate in self.removed) + sum(
            (*self.leftovers.values(), *self.image_copies.values())
        )


def prune(rules: PruneRules, *, dry_run: bool) -> Pruned:
    """Remove the caches of the cache home that the rules select, and with `incomplete` leftovers of killed commands.

    Raises:
        StorageError: no permission, or a cache that came into use just now.
    """
    records = list_caches()
    copies = {cache_home() / folder: suffix for folder, suffix in _COPIES.items()}
    found = [path for folder in (cache_home(), *copies) for path in find_leftovers(folder)] if rules.incomplete else []
    found += idle_stages() if rules.incomplete else []
    candidates = find_candidates(records, rules)
    removed = {candidate.record.path for candidate in candidates if candidate.kept_because is None}
    pruned = Pruned(
        candidates=tuple(candidates),
        leftovers={path: _bytes(path) for path in found},
        image_copies={
            path: size
            for folder, suffix in copies.items()
            for path, size in _unread_images(folder, suffix, rules).items()
        },
        bytes_left=remaining_bytes(records, removed),
    )
    if not dry_run:
        for candidate in pruned.removed:
            remove(candidate.record.path)
        remove_leftovers([*pruned.leftovers, *pruned.image_copies])
    return pruned


def find_candidates(
    records: Sequence[CacheRecord], rules: PruneRules, *, now_s: float | None = None
) -> list[Candidate]:
    """The caches that the rules select, least recently used first. Kept ones count towards `keep_bytes`."""
    now_s = time.time() if now_s is None else now_s
    by_use = sorted(records, key=lambda record: record.used_s)
    chosen = {record.path: reason for record in by_use if (reason := _reason(record, rules, now_s))}
    kept = {record.path: _kept_because(record, now_s) for record in by_use}
    if rules.keep_bytes is not None:
        left = remaining_bytes(records, {path for path in chosen if kept[path] is None})
        for record in by_use:
            if left <= rules.keep_bytes:
                break
            if record.path not in chosen and not record.path.is_symlink():
                chosen[record.path] = "least recently used, the home is too large"
                left -= record.size_bytes if kept[record.path] is None else 0
    return [
        Candidate(record=record, reason=chosen[record.path], kept_because=kept[record.path])
        for record in by_use
        if record.path in chosen
    ]


def remaining_bytes(records: Iterable[CacheRecord], removed: Collection[Path]) -> int:
    """The size of the other caches, without those that are elsewhere and only linked to."""
    others = (record for record in records if record.path not in removed)
    return sum(record.size_bytes for record in others if not record.path.is_symlink())


def remove(path: Path) -> None:
    """Remove a cache, or only the link if `path` is a link to one.

    The cache is renamed first: readers see all of it or nothing, even if the removal is killed.

    Raises:
        StorageError: not a cache, a cache that is being built, staged or copied, or no permission.
    """
    if not is_cache(path):
        raise StorageError("not a cache: nothing was removed", where=path, expected="a folder with zarr.json")
    if reason := _why_in_use(path, time.time()):
        raise StorageError(f"{reason}: nothing was removed", where=path, next_step="try again when that is done")
    hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        # First, or a killed removal would leave them: a cache that is built here later would count as a mirror.
        for file in (used_file(path), origin_file(path)):
            SafeFolder(file.parent).remove(file.name)
        path.rename(hidden)
        sync_folder(path.parent)
        remove_leftover(hidden)
    except OSError as error:
        raise storage_error(error) from error
    remove_dead_claims(LocalPlace(path))
    remove_leases(LocalPlace(path))


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove what `files.find_leftovers` found.

    Raises:
        StorageError: no permission.
    """
    for path in paths:
        try:
            remove_leftover(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise storage_error(error) from error


def _unread_images(folder: Path, suffix: str, rules: PruneRules) -> dict[Path, int]:
    """Bytes of each copy of images that the rules select. Their time is that of the last reading."""
    limits = [limit for limit in (rules.older_than_s, rules.unused_for_s) if limit is not None]
    if not limits:
        return {}
    try:
        files = SafeFolder(folder)
        return {
            folder / entry.name: _bytes(folder / entry.name)
            for entry in files.entries()
            if entry.is_file and entry.name.endswith(suffix) and files.age_s(entry.name) > min(limits)
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _bytes(path: Path) -> int:
    """The size of a file or a whole folder."""
    folder = SafeFolder(path.parent)
    status = folder.status(path.name) if folder.is_file(path.name) else None
    return size_and_time(path)[0] if status is None else status.st_size


def _reason(record: CacheRecord, rules: PruneRules, now_s: float) -> str | None:
    reasons: Iterable[tuple[bool, str]] = (
        (rules.incomplete and record.problem is not None, "cannot be opened" if record.unknown else "damaged"),
        (rules.incomplete and not record.complete, _why_incomplete(record)),
        (
            rules.older_than_s is not None and now_s - record.modified_s > rules.older_than_s,
            f"written {_days(now_s - record.modified_s)} ago",
        ),
        (
            rules.unused_for_s is not None and now_s - record.used_s > rules.unused_for_s,
            f"unused for {_days(now_s - record.used_s)}",
        ),
    )
    return next((reason for applies, reason in reasons if applies), None)


def _why_incomplete(record: CacheRecord) -> str:
    if record.origin:
        return "staged in part"
    return f"{record.views_dropped} of its views were dropped" if record.views_dropped else "half-built"


def _kept_because(record: CacheRecord, now_s: float) -> str | None:
    if not is_cache(record.path):
        return "not a cache: without zarr.json it may be anything, such as an interrupted copy"
    if record.path.is_symlink():
        return "a link: the cache is elsewhere"
    if record.unknown:
        return f"{record.unknown}: it may be sound"
    return _why_in_use(record.path, now_s)


def _why_in_use(path: Path, now_s: float) -> str | None:
    """Why a cache is in use, None if it is not: a process that builds, stages or copies it holds a fresh claim."""
    newest = _newest_claim(path)
    if newest is not None and newest - now_s > EXPIRE_S:  # the clock was set back: whoever is alive renews a claim
        time.sleep(RENEWED_S)
        renewed = _newest_claim(path)
        newest = None if renewed == newest else renewed
    is_used = newest is not None and now_s - newest < EXPIRE_S
    return "being built, staged or copied right now" if is_used else None


def _newest_claim(path: Path) -> float | None:
    """When the newest claim on a cache was renewed (s); None if there is no claim."""
    try:
        return max((entry.modified_s for entry in claims_place(LocalPlace(path)).entries()), default=None)
    except StorageError:
        return None


def _days(age_s: float) -> str:
    return f"{age_s / 86_400:.1f} days"
