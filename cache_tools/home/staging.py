"""Read a cache from an object store: the parts that a reader needs are staged in a mirror in the cache home.

Opening a URL stages metadata, labels, keys and constants. A view's blocks are staged when the view is first needed,
each checked against its commit. The mirror is a valid half-built cache at every moment, in the place where the same
recipe would be built. Processes that stage into one mirror at the same time claim blocks as builders do, so that each
block is staged once. With a budget, views are staged in a folder of their own, and dropped again (`home.stage`).
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cache_tools.console import Progress, print_line, storage_error, warn
from cache_tools.errors import CacheError, MismatchError, NotFoundError, StorageError
from cache_tools.files import PARTIAL, SafeFolder, find_leftovers, remove_leftover, rename_unless_exists, sync_folder
from cache_tools.format import commits
from cache_tools.format.arrays import target_arrays
from cache_tools.format.commits import BlockId
from cache_tools.format.manifest import Manifest
from cache_tools.format.rolling import Rolling
from cache_tools.home.origin import OriginRecord, mirrors_of, read_origin, write_origin
from cache_tools.home.registry import cache_home, cache_path, is_cache, read_complete_views
from cache_tools.home.stage import Stage, stage_path
from cache_tools.places import LocalPlace, Place, open_place
from cache_tools.places.claims import Claims, growing
from cache_tools.places.metadata import check_same, copy_metadata, manifest_at, refresh_test_split
from cache_tools.places.rolling import files_of_views
from cache_tools.places.transfer import copy_blocks, list_committed
from cache_tools.store.blocks import LocalBlocks, read_commits
from cache_tools.store.group import read_manifest
from cache_tools.system import named

if TYPE_CHECKING:
    import zarr

OFFLINE_VARIABLE = "TEACHER_CACHE_OFFLINE"
PATIENCE_S = 10.0


def connect(url: str, stage_budget: int | None = None) -> Origin:
    """Open the cache at a URL: stage what every reader needs of it.

    If the store does not answer, or TEACHER_CACHE_OFFLINE is set, an existing mirror is used alone.

    Args:
        stage_budget: bytes that staged files may take; then views come to a stage instead of the mirror.

    Raises:
        RecipeError: a budget that has no room for two views.
        NotFoundError: no cache at the URL, or a folder of caches.
        FormatError: something that is not a cache, or a damaged cache.
        MismatchError: the cache home has the same cache, but half-built and in blocks of another size.
        StorageError: the store does not answer and nothing is staged, or the disk is full.
    """
    url = url.rstrip("/")
    existing = next(iter(mirrors_of(url, cache_home())), None)
    if is_offline():
        if existing is None:
            raise NotFoundError(
                f"nothing of this cache is staged, and {OFFLINE_VARIABLE} is set",
                where=url,
                next_step=f"unset {OFFLINE_VARIABLE}",
            )
        return Origin(*existing)
    try:
        place = open_place(url, patience_s=PATIENCE_S if existing else None)
        manifest = manifest_at(place)
    except NotFoundError as error:
        raise _not_a_cache(open_place(url), error, existing and existing[0]) from error
    except StorageError as error:
        if existing is None:
            raise
        warn(f"{error} Continuing with what is staged in {existing[0]}")
        return Origin(*existing, ask_store=False)
    mirror = cache_path(manifest.name, manifest.fingerprint)
    record = OriginRecord(url=url, fingerprint=manifest.fingerprint, views=manifest.num_views)
    if _has_every_view(mirror, manifest):
        nothing_to_stage = replace(record, views=0, complete=True)
        before = read_origin(mirror)
        if before is not None and before.is_mirror:
            _follow_test_split(mirror, manifest)
        if before is None:
            with suppress(OSError):  # a read-only home: only opening the URL while offline will fail
                write_origin(mirror, nothing_to_stage)
        return Origin(mirror, nothing_to_stage)
    if stage_budget is not None:
        return _open_stage(place, manifest, record, stage_budget)
    sizes = [*stage_metadata(place, mirror, manifest), *_follow_test_split(mirror, manifest)]
    before = read_origin(mirror)
    if before is None or replace(before, complete=False) != record:
        _write_record(mirror, record)
    origin = Origin(mirror, read_origin(mirror) or record, checked=True)
    origin.bytes = sum(sizes)
    return origin


def _open_stage(place: Place, manifest: Manifest, record: OriginRecord, budget: int) -> Origin:
    """The cache with a stage in place of a mirror."""
    stage = Stage(stage_path(manifest.name, manifest.fingerprint), budget)
    try:
        with stage.locked():
            # Only who holds the lock makes them, so these are of killed processes.
            for leftover in find_leftovers(stage.path.parent, f".{stage.path.name}.", age_s=0.0):
                remove_leftover(leftover)
            sizes = [*stage_metadata(place, stage.path, manifest), *_follow_test_split(stage.path, manifest)]
        origin = Origin(stage.path, record, checked=True, stage=stage)
        origin.bytes = sum(sizes)
        stage.open(manifest, partial(origin.view_bytes, manifest), partial(origin.stage, manifest))
    except BaseException:
        stage.close()
        raise
    return origin


def is_offline() -> bool:
    """Whether TEACHER_CACHE_OFFLINE forbids requests to object stores."""
    return os.environ.get(OFFLINE_VARIABLE, "").lower() not in {"", "0", "false", "no"}


class Origin:
    """The remote cache that a mirror is staged from. Made by `connect`, or from the record beside a mirror.

    That record may have been received with the mirror: the store is asked only if the user has named its URL before.

    Args:
        checked: whether the cache in the store is known to be the one of the mirror.
        ask_store: whether to ask the store which blocks it has; False if it just failed to answer.
        stage: that takes the place of a mirror, and drops views again.

    Attributes:
        mirror: folder of the mirror.
        bytes: staged by this process so far, metadata included.
    """

    def __init__(
        self,
        mirror: Path,
        record: OriginRecord,
        *,
        checked: bool = False,
        ask_store: bool = True,
        stage: Stage | None = None,
    ) -> None:
        self.mirror, self.bytes, self.budgeted = mirror, 0, stage
        self._view_bytes: dict[int, int] = {}
        self._record, self._checked = record, checked
        self._is_named = named.is_named("stores", record.url)
        self._ask_store = ask_store and self._is_named and not is_offline()
        self._in_store: set[BlockId] = set()

    @property
    def url(self) -> str:
        return self._record.url

    def blocks(self, manifest: Manifest, table: zarr.Array[Any]) -> StagedBlocks:
        """The blocks that a reader of the mirror can read; `table` is the mirror's array `commits`."""
        return StagedBlocks(self, manifest, table)

    def place(self, patience_s: float | None = None) -> Place:
        """The store, after a check that its cache is the one of the mirror.

        Raises:
            CacheError: the store may not be asked, does not answer, or has another cache now.
        """
        self._require_store("the store was not asked")
        return self._place(patience_s)

    def committed(self, manifest: Manifest) -> npt.NDArray[np.bool_]:
        """Which blocks the store has, bool [V, blocks]. Asks the store until it has all of them.

        If the store does not answer, prints a warning and gives what was known before.

        Raises:
            CacheError: no view is staged, and the store does not answer or has another cache now.
        """
        if not self._record.complete and self._ask_store:
            try:
                self._list_store(manifest)
            except CacheError as error:
                if not read_complete_views(self.mirror, manifest):
                    raise
                self._ask_store = False
                warn(f"{error} Continuing with what is staged in {self.mirror}")
        table = np.zeros((manifest.num_views, manifest.num_blocks), bool)
        table[: self._record.views if self._record.complete else 0] = True
        for view, block in self._in_store:
            if view < manifest.num_views and block < manifest.num_blocks:
                table[view, block] = True
        return table

    def view_bytes(self, manifest: Manifest, view: int) -> int:
        """The bytes of a view in the store, from a list of its files; asks again until the view is complete."""
        if view not in self._view_bytes:
            complete = np.flatnonzero(self.committed(manifest).all(axis=1)).tolist()
            found: dict[int, int] = {}
            for name in (commits.COMMITS, *(spec.name for spec in target_arrays(manifest.recipe, manifest.block_rows))):
                for each, entry in files_of_views(self._place(None), name):
                    found[each] = found.get(each, 0) + entry.size
            self._view_bytes = {each: found.get(each, 0) for each in complete}
            return found.get(view, 0)
        return self._view_bytes[view]

    def stage(self, manifest: Manifest, view: int) -> None:
        """Copy the blocks of a view that the store has and the mirror lacks. Waits for others who stage it now.

        Raises:
            StorageError: the store does not answer, the disk is full, or TEACHER_CACHE_OFFLINE is set.
            MismatchError, NotFoundError: another cache, or none, is at the URL now.
            FormatError: a damaged block in the store.
        """
        self._require_store(f"view {view} is not staged")
        source, target = self._place(None), LocalPlace(self.mirror)
        in_store = self.committed(manifest)[view]
        wanted = [BlockId(view, block) for block in range(manifest.num_blocks) if in_store[block]]

        def is_staged(block: BlockId) -> bool:
            return SafeFolder(self.mirror).exists(block.commit_key)

        def list_staged() -> set[BlockId]:
            return set(filter(is_staged, wanted))

        staged = list_staged()
        missing = [block for block in wanted if block not in staged]
        title = f"stage {manifest.name}, view {view}"
        with (
            Claims(target) as claims,
            Progress(title, len(wanted), "blocks", done=len(staged), summary=True) as progress,
        ):
            copied_bytes = 0
            claimed = self._begun(view, claims.share(missing, list_staged, is_staged))
            for block, sizes in copy_blocks(source, target, manifest, claimed):
                claims.release(block)
                copied_bytes += sum(sizes)
                progress.advance(1, f"{copied_bytes / 1e6:,.1f} MB")
            progress.advance(len(wanted) - progress.done)  # blocks that others staged meanwhile
        self.bytes += copied_bytes

    def _begun(self, view: int, blocks: Iterator[BlockId]) -> Iterator[BlockId]:
        """The claimed blocks of a view. What a killed process left of one in a stage is removed before it is copied
        again, because there is room for one copy only.
        """
        unfinished = {} if self.budgeted is None else self.budgeted.unfinished(view)
        for block in blocks:
            if self.budgeted is not None and self.budgeted.is_stopped:
                raise CancelledError
            for file in unfinished.get(block, ()):
                SafeFolder(self.mirror).remove(file)
            yield block

    def _require_store(self, what: str) -> None:
        """Raise StorageError, which begins with what is wrong, if the store may not be asked."""
        if is_offline():
            raise StorageError(
                f"{what}, and {OFFLINE_VARIABLE} is set",
                where=self.mirror,
                next_step=f"unset {OFFLINE_VARIABLE}, or `cache-tools pull` the cache while there is a network",
            )
        if not self._is_named:
            raise StorageError(
                f"{what}, and you have not named the store that is recorded beside this mirror",
                where=self.mirror,
                found=self.url,
                next_step="if you trust it, give its URL once in place of the folder",
            )

    def _place(self, patience_s: float | None) -> Place:
        """The store, after a check that its cache is the one of the mirror."""
        place = open_place(self.url, patience_s=patience_s)
        if not self._checked:
            found = manifest_at(place)
            if found.fingerprint != self._record.fingerprint:
                raise MismatchError(
                    "the URL that this mirror was staged from has another cache now",
                    where=self.url,
                    expected=f"fingerprint {self._record.fingerprint[:12]}",
                    found=found.fingerprint[:12],
                    next_step="open the new one by its URL",
                )
            check_same(read_manifest(self.mirror), found, LocalPlace(self.mirror))  # it may have been built again
            self._checked = True
        return place

    def _list_store(self, manifest: Manifest) -> None:
        self._in_store = list_committed(self._place(PATIENCE_S))
        views, blocks = self._record.views, manifest.num_blocks
        if sum(each.view < views and each.block < blocks for each in self._in_store) == views * blocks:
            self._record = replace(self._record, complete=True)
            if self.budgeted is None:
                _write_record(self.mirror, self._record)


class StagedBlocks(LocalBlocks):
    """The blocks of a remote cache. Those that its mirror lacks are staged when they are needed."""

    def __init__(self, origin: Origin, manifest: Manifest, table: zarr.Array[Any]) -> None:
        super().__init__(origin.mirror, manifest, table)
        self.where, self._origin = origin.url, origin

    def committed(self) -> npt.NDArray[np.bool_]:
        """Which blocks are in the mirror or in the store, bool [V, blocks]."""
        staged = super().committed()
        return staged if staged.all() else staged | self._origin.committed(self._manifest)

    def rolling(self) -> Rolling | None:
        return None if self._manifest.rolling is None else manifest_at(self._origin.place(PATIENCE_S)).rolling

    def hold(self, views: Sequence[int]) -> None:
        if (stage := self._origin.budgeted) is not None:
            wanted = [view for view in views if 0 <= view < self._manifest.num_views]
            if stage.use(wanted):
                self.digests = read_commits(self._table, self._origin.mirror, self._manifest)

    def release(self, view: int) -> None:
        if self._origin.budgeted is not None:
            self._origin.budgeted.release(view)

    def _missing(self, view: int, blocks: range) -> list[int]:
        """Blocks that neither the mirror nor the store has. If there are none, stages the view."""
        missing = super()._missing(view, blocks)
        if not missing or self._origin.budgeted is not None:
            return missing
        in_store = self._origin.committed(self._manifest)[view]
        if not in_store[missing].all():
            return [block for block in missing if not in_store[block]]
        self._origin.stage(self._manifest, view)
        return super()._missing(view, blocks)


def stage_metadata(place: Place, mirror: Path, manifest: Manifest) -> list[int]:
    """Copy metadata, labels, keys and constants of a remote cache into its mirror, all or none.

    Processes that do so at the same time copy them once.

    Returns:
        sizes of the files copied.

    Raises:
        MismatchError: the same cache is there with other constants or blocks.
        StorageError: something else is there, a full or read-only disk, an unreachable store.
    """
    with _locked(mirror):
        if is_cache(mirror):
            return copy_metadata(place, LocalPlace(mirror), manifest)
        temporary = mirror.with_name(f".{mirror.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            sizes = copy_metadata(place, LocalPlace(temporary), manifest)
            rename_unless_exists(temporary, mirror)
            sync_folder(mirror.parent)
        except OSError as error:
            raise storage_error(error) from error
        finally:
            with suppress(OSError):
                remove_leftover(temporary)
        if not is_cache(mirror):
            raise StorageError(
                "cannot make a mirror here: the place is taken", where=mirror, next_step="remove what is there"
            )
        return sizes


def _follow_test_split(mirror: Path, manifest: Manifest) -> list[int]:
    """Give a mirror the test splits of the cache in the store. A home that is read-only keeps the old ones."""
    before = read_manifest(mirror).dataset
    if before.test_split == manifest.dataset.test_split:
        return []
    try:
        with growing(LocalPlace(mirror)):
            sizes = refresh_test_split(LocalPlace(mirror), manifest)
    except StorageError as error:
        warn(f"{error} Students are tested on the split that the mirror names, not on that of the store")
        return []
    now, then = (", ".join(dataset.test_splits) or "none" for dataset in (manifest.dataset, before))
    print_line(f"note: the test split of this cache is now {now} (it was {then})", file=sys.stderr)
    return sizes


@contextmanager
def _locked(mirror: Path) -> Iterator[None]:
    """Hold a lock on the folder of a mirror, created if need be. The system releases it when the process ends."""
    try:
        import fcntl

        descriptor = _open_folder(mirror)
    except ImportError:  # Windows has no fcntl: processes may copy the same metadata twice
        yield
        return
    except OSError as error:
        raise storage_error(error) from error
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):  # fails unless the folder is still empty, because nothing was copied
            mirror.rmdir()
        os.close(descriptor)


def _open_folder(folder: Path) -> int:
    """A descriptor of a folder, created if need be; tries again if another process removes the empty folder."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)


def _has_every_view(mirror: Path, manifest: Manifest) -> bool:
    """Whether the home has every view of a remote cache: staged or built, perhaps with other blocks or constants."""
    if not is_cache(mirror):
        return False
    found = read_manifest(mirror)
    complete = set(read_complete_views(mirror, found))
    return found.fingerprint == manifest.fingerprint and set(range(manifest.num_views)) <= complete


def _write_record(mirror: Path, record: OriginRecord) -> None:
    try:
        write_origin(mirror, record)
    except OSError as error:
        raise storage_error(error) from error


def _not_a_cache(place: Place, error: NotFoundError, mirror: Path | None) -> NotFoundError:
    """The error for a URL that has no cache, with advice if it is a folder of caches or has a mirror."""
    names = place.folders()
    if names:
        listed = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        return NotFoundError(
            "this is a folder, not a cache",
            where=place,
            expected="the URL of one cache",
            found=listed,
            next_step=f"give one of them ({place}/{names[0]}); `cache-tools ls {place}` lists them",
        )
    if mirror is not None:
        return NotFoundError(
            error.what, where=error.where, next_step=f"what was staged of it is in {mirror}: give that path"
        )
    return error
