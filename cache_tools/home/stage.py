"""Stages: folders of the cache home with a few views of a remote cache at a time, within a budget (`--stage-budget`).

A stage is a half-built cache like a mirror, `staged/FINGERPRINT/NAME.zarr`, but its views are dropped again. Any number
of processes share it. Beside it are a mark for every view that one of them reads or is about to read (a claim, see
`places.claims`), and a reservation of every view that is there or being copied, `.NAME.zarr.reserved/VIEW.BYTES`. It is
made before the first byte of the view is written, and removed after the last byte is deleted, under a lock. So the
reservations never add up to less than what is on the disk, even after a process was killed.

A process marks a view before it looks whether the view is there, and views with a living mark are never dropped. It
needs one view at a time, and gives up the others before it waits for room, so processes cannot block each other.
"""

from __future__ import annotations

import re
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from cache_tools.console import print_line, storage_error
from cache_tools.errors import CacheError, RecipeError, StorageError
from cache_tools.files import PARTIAL, SafeFolder, remove_leftover
from cache_tools.format import commits
from cache_tools.format.arrays import target_arrays
from cache_tools.format.commits import BlockId
from cache_tools.format.manifest import Manifest
from cache_tools.home.registry import cache_home, cache_path
from cache_tools.places import LocalPlace
from cache_tools.places.claims import GROW, Claims
from cache_tools.places.rolling import files_of_views, remove_views
from cache_tools.units import counted, human_bytes

STAGES = "staged"
FIRST_LOOK_S, LONGEST_LOOK_S = 0.1, 2.0
"""Between two looks for room that other processes may have given up."""

_RESERVATION = re.compile(r"([0-9]{1,10})\.([0-9]{1,18})")
_PARTIAL_END = re.compile(rf"\.[0-9a-f]{{32}}{re.escape(PARTIAL)}$")


def stage_path(name: str, fingerprint: str) -> Path:
    """Where the stage of a cache is; its files beside it are in the same folder."""
    return cache_home() / STAGES / fingerprint[:12] / cache_path(name, fingerprint).name


def idle_stages() -> list[Path]:
    """The folders of stages that no process uses."""
    found = []
    home = SafeFolder(cache_home())
    with suppress(OSError):
        for entry in home.entries(STAGES):
            folder = cache_home() / STAGES / entry.name
            caches = [each.name for each in SafeFolder(folder).entries() if each.name[:1] != "."]
            if not any(Claims(LocalPlace(folder / name)).marks() for name in caches):
                found.append(folder)
    return found


class Stage:
    """One process's part in a stage. Made before anything is in the folder; `open` says what to fill it with.

    A single thread at a time calls `use` and `release`.

    Args:
        path: of the stage.
        budget: bytes that its files may take.
    """

    def __init__(self, path: Path, budget: int) -> None:
        self.path, self.budget = path, budget
        self._place = LocalPlace(path)
        self._reserved = self._place.sibling(f".{path.name}.reserved")
        self._claims = Claims(self._place).__enter__()
        self._own = self._claims.prevent_pruning()
        self._marks: dict[int, BlockId] = {}
        self._there: set[int] = set()  # of the marked views, those that are on the disk
        self._used: tuple[int, ...] = ()
        self._prepared: int | None = None
        self._turn, self._stop = threading.Lock(), threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stage")
        self._fixed = 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from adding and dropping anything."""
        with self._claims.holding(GROW):
            yield

    def open(self, manifest: Manifest, view_bytes: Callable[[int], int], copy: Callable[[int], None]) -> None:
        """Say what views the stage has.

        Args:
            view_bytes: the size of a view in the store.
            copy: copies what is missing of a view from the store.

        Raises:
            RecipeError: a budget that has no room for two views.
        """
        self._manifest, self._view_bytes, self._copy = manifest, view_bytes, copy
        with self.locked():
            if not self._others():
                self._place.tidy()
                for name in self._target_arrays():
                    SafeFolder(self.path).remove_partials(name, age_s=0.0)
        files = sum(entry.size for entry in self._place.entries())
        self._fixed = files - sum(
            entry.size for name in self._target_arrays() for _, entry in files_of_views(self._place, name)
        )
        self.require_room(2)

    def require_room(self, views: int) -> None:
        """Raise RecipeError unless so many of the largest views fit, or all of fewer."""
        sizes = sorted(self._view_bytes(view) for view in range(self._manifest.num_views))[-views:]
        if (needed := self._fixed + sum(sizes)) > self.budget:
            raise RecipeError(
                f"the stage has no room for {counted(len(sizes), 'view')}: one in use, and the next"
                + (", and the one that CLIP's targets come from" if views > 2 else ""),
                where=f"--stage-budget {human_bytes(self.budget)}",
                expected=f"at least {needed:,} bytes ({human_bytes(self._fixed)} of labels, keys and constants, and "
                f"{' + '.join(map(human_bytes, sizes))})",
                found=f"{self.budget:,} bytes",
                next_step=f"--stage-budget {needed}B or more, or leave it out to keep every view that is read",
            )

    def use(self, views: Sequence[int]) -> bool:
        """Stage these views, and keep them until `use` of others or `release`. Gives up those of earlier calls.

        Returns:
            False if they are those of the call before, and still there.

        Raises:
            CancelledError: `stop` was called while there was no room.
        """
        if self._used == (used := tuple(views)) and self._there.issuperset(used):
            return False  # without waiting for the next view to be prepared
        with self._turn:
            self._used = used
            for view in views:
                self._mark(view)
            if self._prepared in views:
                self._prepared = None
            for view in [*self._marks]:
                if view not in views and view != self._prepared:
                    self._unmark(view)
            for view in views:
                self._bring(view, wait=True)
            return True

    def prepare(self, view: int) -> None:
        """Begin to stage a view that will be used next, in a thread, if there is room for it now."""
        self._thread.submit(self._prepare, view)

    def _prepare(self, view: int) -> None:
        with self._turn:
            if view in self._marks or view in self._used or self._stop.is_set():
                return
            if self._prepared is not None:
                self._unmark(self._prepared)
            self._prepared = view
            self._mark(view)
            if not self._bring(view, wait=False):
                self._unmark(view)
                self._prepared = None

    def release(self, view: int) -> None:
        """This process does not need a view on the disk any more. It stays until room is needed."""
        with self._turn:
            self._unmark(view)

    def unfinished(self, view: int) -> dict[BlockId, list[str]]:
        """The files of the uncommitted blocks of a view: a process writes them now, or was killed while it did."""
        folder, found = SafeFolder(self.path), dict[BlockId, list[str]]()
        for name in self._target_arrays():
            with suppress(FileNotFoundError):
                for entry in folder.entries(name):
                    block = commits.parse_file_name(_PARTIAL_END.sub("", entry.name))
                    if block is not None and block.view == view and not folder.exists(block.commit_key):
                        found.setdefault(block, []).append(f"{name}/{entry.name}")
        return found

    def stop(self) -> None:
        """End waiting for room and copying in other threads, until `resume`."""
        self._stop.set()

    def resume(self) -> None:
        """Views may be staged again after `stop`."""
        self._stop.clear()

    @property
    def is_stopped(self) -> bool:
        return self._stop.is_set()

    def close(self) -> None:
        """Give up all views; the last process that uses the stage removes it."""
        self.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)
        with self._turn:
            if self._claims.are_released:
                return
            with suppress(CacheError, OSError), self.locked():
                if not self._others():
                    self._remove()
                # Before the lock is free: of two processes that close at once, the second must not see the first.
                for mark in (self._own, *self._marks.values()):
                    self._claims.release(mark)
            self._claims.__exit__(None, None, None)
            for folder in (self.path.parent, self.path.parent.parent):
                with suppress(OSError):  # other stages, or other processes
                    folder.rmdir()

    def __str__(self) -> str:
        views = self._manifest.num_views
        return (
            f"stage: views come to {self.path} shortly before they are read, and are dropped when room is needed: at "
            f"most {human_bytes(self.budget)} at a time, for {counted(views, 'view')} of {self._manifest.name}"
        )

    def __reduce__(self) -> tuple[object, ...]:
        raise RecipeError(
            "a cache with a stage budget cannot be given to another process",
            where=self.path,
            next_step="open it there, with the same budget: the processes share the stage",
        )

    def _bring(self, view: int, *, wait: bool) -> bool:
        """Have a marked view on the disk; False if there is no room and `wait` is not set."""
        if view in self._there:
            return True
        pause_s, told = FIRST_LOOK_S, False
        while not self._reserve(view, gives_way=not wait):
            if not wait:
                return False
            if self._prepared is not None:  # others wait for room as well
                self._unmark(self._prepared)
                self._prepared = None
                continue
            if not told:
                print_line(
                    f"waiting for room in the stage {self.path.name}: other runs use its views, and "
                    f"--stage-budget {human_bytes(self.budget)} has no room for view {view} beside them",
                    file=sys.stderr,
                )
                told = True
            if self._stop.wait(pause_s):
                raise CancelledError
            pause_s = min(1.5 * pause_s, LONGEST_LOOK_S)
        self._copy(view)
        self._there.add(view)
        return True

    def _reserve(self, view: int, *, gives_way: bool) -> bool:
        """Reserve the room of a view, and drop views that nobody needs for it.

        Args:
            gives_way: leave the room to others if any of them waits for some.
        """
        wanted = self._view_bytes(view)
        with self.locked():
            reserved = self._reservations()
            if view in reserved:
                return True
            marks = set(self._claims.marks().values()) - {-1}
            if gives_way and marks - reserved.keys() - {view}:
                return False
            room = self.budget - self._fixed - sum(reserved.values())
            # Epochs show the views in order, and begin again: the one before the wanted one is needed last.
            count = self._manifest.num_views
            for other in sorted(reserved.keys() - marks, key=lambda each: (each - view) % count, reverse=True):
                if room >= wanted:
                    break
                self._drop([other])
                room += reserved[other]
            if room < wanted:
                return False
            self._reserved.put(f"{view}.{wanted}", b"")
            return True

    def _reservations(self) -> dict[int, int]:
        """The bytes reserved for each view."""
        matches = [_RESERVATION.fullmatch(entry.key) for entry in self._reserved.entries()]
        return {int(match[1]): int(match[2]) for match in matches if match}

    def _drop(self, views: Sequence[int]) -> None:
        remove_views(self._place, self._manifest, lambda view: view in views)
        self._reserved.delete([f"{view}.{size}" for view, size in self._reservations().items() if view in views])

    def _remove(self) -> None:
        hidden = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            self.path.rename(hidden)
            remove_leftover(hidden)
        except OSError as error:
            raise storage_error(error) from error
        self._reserved.delete([entry.key for entry in self._reserved.entries()])
        self._reserved.tidy()

    def _others(self) -> bool:
        """Whether other processes use the stage."""
        return bool(self._claims.marks().keys() - {self._own, *self._marks.values()})

    def _target_arrays(self) -> list[str]:
        specs = target_arrays(self._manifest.recipe, self._manifest.block_rows)
        return [commits.COMMITS, *(spec.name for spec in specs)]

    def _mark(self, view: int) -> None:
        if view not in self._marks:
            self._marks[view] = self._claims.mark_view(view)

    def _unmark(self, view: int) -> None:
        self._there.discard(view)
        if (mark := self._marks.pop(view, None)) is not None:
            with suppress(StorageError):  # it expires
                self._claims.release(mark)
