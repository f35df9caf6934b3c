"""Read a cache straight from an object store: what is needed of it is staged in a mirror in the cache home.

Opening brings metadata, labels, keys and constants; a view's blocks come when the view is first needed, each checked
against its commit. The mirror is an ordinary half-built cache at every instant, where the same recipe would be built.
Any number of processes may stage into it at once: each block is claimed, as builders do it, and comes once.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cache_tools.console import Progress, storage_error, warn
from cache_tools.errors import CacheError, MismatchError, NotFoundError, StorageError
from cache_tools.files import PARTIAL, rename_unless_exists, sync_folder
from cache_tools.format.commits import BlockId
from cache_tools.format.manifest import Manifest
from cache_tools.home import registry
from cache_tools.home.origin import OriginRecord, mirrors_of, read_origin, write_origin
from cache_tools.home.registry import is_cache
from cache_tools.places import LocalPlace, Place, open_place
from cache_tools.places.claims import Claims
from cache_tools.places.metadata import check_same, copy_metadata, manifest_at
from cache_tools.places.transfer import copy_blocks, list_committed
from cache_tools.store.blocks import LocalBlocks
from cache_tools.store.group import read_manifest

if TYPE_CHECKING:
    import zarr

OFFLINE_VARIABLE = "TEACHER_CACHE_OFFLINE"
PATIENCE_S = 10.0


class Origin:
    """The remote cache behind a mirror. Made by `connect`, or from the record beside a mirror.

    Attributes:
        mirror: folder of the mirror.
        bytes: staged by this process so far, metadata included.
    """

    def __init__(self, mirror: Path, record: OriginRecord, *, checked: bool = False, silent: bool = False) -> None:
        self.mirror, self.bytes = mirror, 0
        self._record, self._checked = record, checked
        self._silent = silent or offline()
        self._there: set[BlockId] = set()

    @property
    def url(self) -> str:
        return self._record.url

    def blocks(self, manifest: Manifest, table: zarr.Array[Any]) -> StagedBlocks:
        """The blocks that a reader of the mirror has; `table` is the mirror's array `commits`."""
        return StagedBlocks(self, manifest, table)

    def committed(self, manifest: Manifest) -> npt.NDArray[np.bool_]:
        """Which blocks the store has, bool [V, blocks]; asked anew until it has all.

        Where the store does not answer, a warning, and what was known before.

        Raises:
            CacheError: the store does not answer, or another cache is there by now, and no view is staged.
        """
        if not self._record.complete and not self._silent:
            try:
                self._look(manifest)
            except CacheError as error:
                if not registry.views_done(self.mirror, manifest):
                    raise
                self._silent = True
                warn(f"{error} Going on with what is staged in {self.mirror}")
        table = np.zeros((manifest.num_views, manifest.num_blocks), bool)
        table[: self._record.views if self._record.complete else 0] = True
        for view, block in self._there:
            if view < manifest.num_views and block < manifest.num_blocks:
                table[view, block] = True
        return table

    def stage(self, manifest: Manifest, view: int) -> None:
        """Bring the blocks of a view that the mirror lacks and the store has. Others who stage it now are waited for.

        Raises:
            StorageError: the store does not answer, the disk is full, or TEACHER_CACHE_OFFLINE is set.
            MismatchError, NotFoundError: another cache, or none, is at the URL by now.
            FormatError: a damaged block in the store.
        """
        if offline():
            raise StorageError(
                f"view {view} is not staged, and {OFFLINE_VARIABLE} is set",
                where=self.mirror,
                next_step=f"unset {OFFLINE_VARIABLE}, or `cache-tools pull` the cache while there is a network",
            )
        source, target = self._place(None), LocalPlace(self.mirror)
        there = self.committed(manifest)[view]
        wanted = [BlockId(view, block) for block in range(manifest.num_blocks) if there[block]]

        def is_here(block: BlockId) -> bool:
            return (self.mirror / block.commit_key).exists()

        def here() -> set[BlockId]:
            return {block for block in wanted if is_here(block)}

        done = here()
        todo = [block for block in wanted if block not in done]
        title = f"stage {manifest.name}, view {view}"
        with (
            Claims(target) as claims,
            Progress(title, len(wanted), "blocks", done=len(done), summary=True) as progress,
        ):
            moved = 0
            for block, sizes in copy_blocks(source, target, manifest, claims.share(todo, here, is_here)):
                claims.release(block)
                moved += sum(sizes)
                progress.advance(1, f"{moved / 1e6:,.1f} MB")
            progress.advance(len(wanted) - progress.done)  # what others staged meanwhile
        self.bytes += moved

    def _place(self, patience_s: float | None) -> Place:
        """The store, once it is known that the cache there is the mirror's."""
        place = open_place(self.url, patience_s=patience_s)
        if not self._checked:
            found = manifest_at(place)
            if found.fingerprint != self._record.fingerprint:
                raise MismatchError(
                    "another cache is at the origin of this mirror by now",
                    where=self.url,
                    expected=f"fingerprint {self._record.fingerprint[:12]}",
                    found=found.fingerprint[:12],
                    next_step="open the new one by its URL",
                )
            check_same(read_manifest(self.mirror), found, LocalPlace(self.mirror))  # it may be built anew
            self._checked = True
        return place

    def _look(self, manifest: Manifest) -> None:
        self._there = list_committed(self._place(PATIENCE_S))
        promised = [each for each in self._there if each.view < self._record.views and each.block < manifest.num_blocks]
        if len(promised) == self._record.views * manifest.num_blocks:
            self._record = self._record.model_copy(update={"complete": True})
            _keep(self.mirror, self._record)


class StagedBlocks(LocalBlocks):
    """The blocks of a remote cache. Those that its mirror lacks are staged when they are needed."""

    def __init__(self, origin: Origin, manifest: Manifest, table: zarr.Array[Any]) -> None:
        super().__init__(origin.mirror, manifest, table)
        self.where, self._origin = origin.url, origin

    def committed(self) -> npt.NDArray[np.bool_]:
        """Which blocks are in the mirror or in the store, bool [V, blocks]."""
        staged = super().committed()
        return staged if staged.all() else staged | self._origin.committed(self._manifest)

    def _missing(self, view: int, blocks: range) -> list[int]:
        """Blocks that neither the mirror nor the store has. If there are none, stages the view."""
        missing = super()._missing(view, blocks)
        if not missing:
            return []
        in_store = self._origin.committed(self._manifest)[view]
        if not in_store[missing].all():
            return [block for block in missing if not in_store[block]]
        self._origin.stage(self._manifest, view)
        return super()._missing(view, blocks)


def connect(url: str) -> Origin:
    """Open the cache at a URL: bring what every reader needs of it into its mirror.

    Where the store does not answer, or TEACHER_CACHE_OFFLINE is set, the mirror alone, if there is one.

    Raises:
        NotFoundError: no cache there, or a folder of caches.
        FormatError: something else is there, or a damaged cache.
        MismatchError: the same cache is in the home already, half-built and in blocks of another size.
        StorageError: the store does not answer and nothing is staged, or the disk is full.
    """
    url = url.rstrip("/")
    known = next(iter(mirrors_of(url, registry.cache_home())), None)
    if offline():
        if known is None:
            raise NotFoundError(
                f"nothing of this cache is staged here, and {OFFLINE_VARIABLE} is set",
                where=url,
                next_step=f"unset {OFFLINE_VARIABLE}",
            )
        return Origin(*known)
    try:
        place = open_place(url, patience_s=PATIENCE_S if known else None)
        manifest = manifest_at(place)
    except NotFoundError as error:
        raise _not_a_cache(open_place(url), error, known and known[0]) from error
    except StorageError as error:
        if known is None:
            raise
        warn(f"{error} Going on with what is staged in {known[0]}")
        return Origin(*known, silent=True)
    mirror = registry.cache_path(manifest.name, manifest.fingerprint)
    record = OriginRecord(url=url, fingerprint=manifest.fingerprint, views=manifest.num_views)
    if _is_here(mirror, manifest):
        nothing_to_stage = record.model_copy(update={"views": 0, "complete": True})
        if read_origin(mirror) is None:
            with suppress(OSError):  # a read-only home: only without a network its URL will not be known
                write_origin(mirror, nothing_to_stage)
        return Origin(mirror, nothing_to_stage)
    sizes = bring_metadata(place, mirror, manifest)
    before = read_origin(mirror)
    if before is None or before.model_copy(update={"complete": False}) != record:
        _keep(mirror, record)
    origin = Origin(mirror, read_origin(mirror) or record, checked=True)
    origin.bytes = sum(sizes)
    return origin


def offline() -> bool:
    """Whether TEACHER_CACHE_OFFLINE forbids to ask object stores."""
    return os.environ.get(OFFLINE_VARIABLE, "").lower() not in {"", "0", "false", "no"}


def _is_here(mirror: Path, manifest: Manifest) -> bool:
    """Whether every view of a remote cache is here: staged, or built here in blocks or with constants of its own."""
    if not registry.is_cache(mirror):
        return False
    found = read_manifest(mirror)
    done = set(registry.views_done(mirror, found))
    return found.fingerprint == manifest.fingerprint and set(range(manifest.num_views)) <= done


def _not_a_cache(place: Place, error: NotFoundError, mirror: Path | None) -> NotFoundError:
    """Nothing, or a folder of caches."""
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


def _keep(mirror: Path, record: OriginRecord) -> None:
    try:
        write_origin(mirror, record)
    except OSError as error:
        raise storage_error(error) from error


def bring_metadata(place: Place, mirror: Path, manifest: Manifest) -> list[int]:
    """Have a mirror hold the metadata, labels, keys and constants of the remote cache: it is none, or a whole one.

    Any number of processes may do so at once: they come once.

    Returns:
        sizes of the files that came.

    Raises:
        MismatchError: the same cache is there with other constants or blocks.
        StorageError: something else is there, a full or read-only disk, an unreachable store.
    """
    with _alone(mirror):
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
            shutil.rmtree(temporary, ignore_errors=True)
        if not is_cache(mirror):
            raise StorageError(
                "cannot make a mirror here: the place is taken", where=mirror, next_step="remove what is there"
            )
        return sizes


@contextmanager
def _alone(mirror: Path) -> Iterator[None]:
    """Keep other processes from bringing the same metadata. The system gives the lock up with the process."""
    try:
        import fcntl

        folder = _opened(mirror)
    except ImportError:  # not on Windows: it comes twice
        yield
        return
    except OSError as error:
        raise storage_error(error) from error
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):  # not empty, unless nothing came
            mirror.rmdir()
        os.close(folder)


def _opened(mirror: Path) -> int:
    """A descriptor of the folder, made if need be; another process for which nothing came may just remove it."""
    while True:
        mirror.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return os.open(mirror, os.O_RDONLY)
