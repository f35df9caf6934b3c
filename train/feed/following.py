"""Wait for the views of a cache that is still being built, here or in an object store (`train-student --follow`)."""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np

from cache_tools.console import print_line
from cache_tools.errors import NotFoundError, RecipeError, printable
from cache_tools.format.rolling import dropped_error
from cache_tools.places.leases import Lease
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice
from cache_tools.units import counted, duration

FIRST_LOOK_S, LONGEST_LOOK_S = 0.5, 10.0
"""Between two looks at the cache: at first, and after a long wait. A look at an object store lists its commits."""
REPEAT_S = 60.0


def wait_for_cache(reference: object, open_cache: Callable[[], TeacherCache]) -> TeacherCache:
    """Open a cache as soon as its builder has created it, and say so while there is none.

    Raises:
        CacheError: as `open_cache`, but for a cache that is not there.
    """
    told: float | None = None
    pause_s = FIRST_LOOK_S
    while True:
        try:
            return open_cache()
        except NotFoundError as error:
            if told is None or time.monotonic() - told > REPEAT_S:
                _print(f"waiting for a builder to create the cache {reference}: {error.what}")
                told = time.monotonic()
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, LONGEST_LOOK_S)


def check_rolling(cache: TeacherCache, choice: FusionChoice, epochs: int, num_views: int) -> None:
    """Raise RecipeError unless a run can follow the build of a rolling cache, in which every view is there once."""
    rolling = cache.manifest.rolling
    if rolling is None:
        return
    if epochs > num_views:
        raise RecipeError(
            "a run that follows a build with --keep-views sees every view once",
            where=cache.path.name,
            expected=f"at most {counted(num_views, 'epoch')}, one for each view",
            found=epochs,
            next_step=f"build with --views {epochs}, or train for {counted(num_views, 'epoch')}",
        )
    if choice.clip_view is not None:
        what, where, change = "the view that CLIP's targets come from", f"clip_view: {choice.clip_view}", "leave it out"
    elif choice.clip_scale == "match":
        what, where, change = (
            "view 0, on which the scale is measured,",
            "clip_scale: match",
            "give the scale as a number",
        )
    else:
        return
    raise RecipeError(
        f"{what} is dropped",
        where=f"fusion.{where}",
        found=f"a cache built with --keep-views {rolling.keep}",
        next_step=f"{change}, or use a cache that keeps all its views",
    )


class Follower:
    """Waits for views of one cache.

    It looks again until the view is complete, however long that takes: a builder may be restarted meanwhile. From the
    builder of a rolling cache it takes a lease, so that no view is dropped that the run still needs.

    Args:
        choice: may take CLIP's part from another view, which is waited for too.
    """

    def __init__(self, cache: TeacherCache, choice: FusionChoice | None = None) -> None:
        self._cache = cache
        self._clip_view = None if choice is None else choice.clip_view
        self._stop = threading.Event()
        self._begun_s, self._begun_with = time.monotonic(), int(cache.committed_blocks().sum())
        self._lease: Lease | None = None

    def begin(self, path: Path, digest: str, epoch: int) -> None:
        """Take the lease of a run, or take it up again.

        Args:
            path, digest: of the run.
            epoch: the next one, which needs the view of its number.

        Raises:
            DroppedError: that view is gone.
        """
        if self._cache.manifest.rolling is None:
            return
        folder = path.absolute()
        key = hashlib.blake2b(f"{digest} {folder}".encode(errors="surrogatepass"), digest_size=8).hexdigest()
        self._lease = Lease(self._cache.place(), key, printable(str(folder)), epoch)
        self._require(epoch)  # after the lease, which a builder looks for once more when it has recorded a drop

    def passed(self, epoch: int) -> None:
        """The run has stored the state before this epoch, and does not go back."""
        if self._lease is not None:
            self._lease.move(epoch)

    def finish(self) -> None:
        """The run needs no view any more."""
        if self._lease is not None:
            self._lease.end()

    def wait(self, view: int, blocks: Sequence[int] | None = None) -> None:
        """Return when a view, or some blocks of it, can be read.

        Raises:
            CancelledError: `stop` was called.
            DroppedError: the view was dropped.
        """
        begun_s, told_s, pause_s = time.monotonic(), None, FIRST_LOOK_S
        while (missing := self._missing(view, blocks)) is not None:
            self._require(view)
            now_s = time.monotonic()
            if told_s is None or now_s - told_s > REPEAT_S:
                _print(f"waiting for view {view} of {self._cache.path.name}: {missing}")
                told_s = now_s
            if self._stop.wait(pause_s):
                raise CancelledError
            pause_s = min(1.5 * pause_s, LONGEST_LOOK_S)
        if told_s is not None:
            _print(f"view {view} is complete after a wait of {duration(time.monotonic() - begun_s)}")

    def stop(self) -> None:
        """End all waiting. A lease stays for the run to go on with, until it expires."""
        self._stop.set()
        if self._lease is not None:
            self._lease.stop()

    def _require(self, view: int) -> None:
        """Raise DroppedError if a view is gone."""
        rolling = self._cache.rolling()
        if rolling is not None and view < rolling.dropped:
            raise dropped_error(rolling, self._cache.path.name, view)

    def _missing(self, view: int, blocks: Sequence[int] | None) -> str | None:
        """What is missing, and at what rate it comes; None if nothing is."""
        committed = self._cache.committed_blocks()
        views = [view, *([] if self._clip_view is None else [self._clip_view])]
        needed = committed[views] if blocks is None else committed[np.ix_(views, list(blocks))]
        if needed.all():
            return None
        text = f"{int(needed.sum())} of {needed.size} blocks are built"
        built, elapsed_s = int(committed.sum()) - self._begun_with, time.monotonic() - self._begun_s
        if built <= 0:
            return f"{text}, none since the run began {duration(elapsed_s)} ago (is `build-cache` running?)"
        return f"{text}, a view takes about {duration(elapsed_s / built * committed.shape[1])}"


def _print(text: str) -> None:
    print_line(text, file=sys.stderr)
