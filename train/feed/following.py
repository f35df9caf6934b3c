"""Wait for the views of a cache that is still being built, here or in an object store (`train-student --follow`)."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError

import numpy as np

from cache_tools.console import print_line
from cache_tools.errors import NotFoundError
from cache_tools.format.manifest import Fusion
from cache_tools.reader import TeacherCache
from cache_tools.units import duration

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


class Follower:
    """Waits for views of one cache.

    It looks again until the view is complete, however long that takes: a builder may be restarted meanwhile.

    Args:
        fusion: may take CLIP's part from another view, which is waited for too.
    """

    def __init__(self, cache: TeacherCache, fusion: Fusion | None = None) -> None:
        self._cache, self._fusion = cache, fusion
        self._stop = threading.Event()
        self._begun_s, self._begun_with = time.monotonic(), int(cache.committed_blocks().sum())

    def wait(self, view: int, blocks: Sequence[int] | None = None) -> None:
        """Return when a view, or some blocks of it, can be read.

        Raises:
            CancelledError: `stop` was called.
        """
        begun_s, told_s, pause_s = time.monotonic(), None, FIRST_LOOK_S
        while (missing := self._missing(view, blocks)) is not None:
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
        """End all waiting."""
        self._stop.set()

    def _missing(self, view: int, blocks: Sequence[int] | None) -> str | None:
        """What is missing, and at what rate it comes; None if nothing is."""
        committed = self._cache.committed_blocks()
        clip_view = None if self._fusion is None else self._fusion.clip_view
        views = [view, *([] if clip_view is None else [clip_view])]
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
