"""Build a rolling cache: at most K views at a time, dropped behind the slowest of the students that follow the build.

The next views are built once there is room for them. Room is made by dropping the oldest, as soon as every student
whose lease counts (`cache_tools.places.leases`) has passed it. Without any student the builder waits.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence

from cache_tools.console import print_line
from cache_tools.format.commits import BlockId
from cache_tools.format.rolling import Rolling
from cache_tools.places.leases import HEARTBEAT_S, Followers, FollowingRun, slowest
from cache_tools.units import counted, duration
from pipeline.build.output import Output

FIRST_LOOK_S, LONGEST_LOOK_S = 0.1, 5.0
REPEAT_S = 60.0


class RollingBuild:
    """Decides when the next views of a rolling cache may be built.

    Args:
        lease_s: for how long a student that does not renew its lease is waited for.
    """

    def __init__(self, output: Output, lease_s: float) -> None:
        self._output, self._lease_s = output, lease_s
        self._followers = Followers(output.place, lease_s)
        self._told_s: float | None = None

    def parts(self, missing: Sequence[BlockId], at_once: int, wait: Callable[[float], bool]) -> Iterator[list[BlockId]]:
        """The missing blocks of the next `at_once` views, each time when there is room for them.

        Args:
            missing: in order of view.
            wait: waits for so many seconds; whether the build ends meanwhile.
        """
        for first in range(0, self._output.manifest.num_views, at_once):
            part = [block for block in missing if first <= block.view < first + at_once]
            if part:
                if not self._make_room(part[-1].view, wait):
                    return
                yield part

    def _make_room(self, view: int, wait: Callable[[float], bool]) -> bool:
        """Wait until this view and those before it fit into the cache, and drop old ones. False if the build ends."""
        pause_s = FIRST_LOOK_S
        while True:
            rolling = self._output.rolling()
            assert rolling is not None, "a rolling cache stays one"
            self._output.forget_dropped(rolling.dropped)
            wanted = view + 1 - rolling.keep
            if rolling.dropped >= wanted:
                self._told_s = None
                return True
            last = slowest(self._followers.living())
            if last is not None and last.view > rolling.dropped:
                self._drop(min(last.view, wanted))
                continue
            self._tell(rolling, last)
            if wait(pause_s):
                return False
            pause_s = min(1.5 * pause_s, LONGEST_LOOK_S)

    def _drop(self, count: int) -> None:
        """Drop the first views, unless a student has come meanwhile that needs one of them."""

        def nobody_needs_them() -> bool:
            last = slowest(self._followers.living())
            return last is None or last.view >= count

        self._output.drop_views(count, nobody_needs_them)

    def _tell(self, rolling: Rolling, last: FollowingRun | None) -> None:
        now_s = time.monotonic()
        if self._told_s is not None and now_s - self._told_s < REPEAT_S:
            return
        self._told_s = now_s
        there = f"{counted(rolling.keep, 'view')} are kept" if rolling.keep > 1 else "one view is kept"
        if last is None:
            text = f"{there}, and no student follows the build: waiting for `train-student --follow`"
        else:
            text = f"{there}, and {last.run} still needs view {last.view}: waiting"
            if last.age_s > 3 * HEARTBEAT_S:
                left_s = max(self._lease_s - last.age_s, 0.0)
                text += f" (it has not been seen for {duration(last.age_s)}, and counts for {duration(left_s)} more)"
        print_line(text, file=sys.stderr)
