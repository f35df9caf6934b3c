"""The clock of a place, and how old its files are: whoever holds one writes it again and again, until it has ended.

The age of a file is measured by the clock of its place. If that clock is set, ages mean nothing for a while: a file
from the future has no age, and after a jump all files seem old. A file has then expired when a process has seen it
unchanged for long enough by its own monotonic clock.
"""

from __future__ import annotations

import time

from cache_tools.places import Place

READ_CLOCK_EVERY_S = 60.0
JUMP_S = 5.0  # a clock that is this far from the monotonic clock was set; a busy host reads it a little late
CLOCK_PREFIX = "now."


class Clock:
    """The clock that dates the files of a place: the clocks of hosts differ.

    The place is asked once a minute; in between, this host's monotonic clock is used.

    Attributes:
        jumped_s: when the clock was last found to have been set, by the monotonic clock.
    """

    def __init__(self, place: Place, owner: str) -> None:
        self._place, self._key = place, f"{CLOCK_PREFIX}{owner}"
        self._read_s, self._offset_s = float("-inf"), 0.0
        self.jumped_s = float("-inf")

    def now_s(self) -> float:
        """Seconds since 1970."""
        if time.monotonic() - self._read_s > READ_CLOCK_EVERY_S:
            self._place.put(self._key, b"", durable=False)
            times = [entry.modified_s for entry in self._place.entries() if entry.key == self._key]
            self._place.delete([self._key])
            is_first, self._read_s = self._read_s == float("-inf"), time.monotonic()
            offset_s = (times[0] if times else time.time()) - self._read_s
            if not is_first and abs(offset_s - self._offset_s) > JUMP_S:
                self.jumped_s = self._read_s
            self._offset_s = offset_s
        return time.monotonic() + self._offset_s

    def remove_leftovers(self, age_s: float) -> None:
        """Remove the clock files of builders that were killed while they read the time."""
        clocks = [entry for entry in self._place.entries() if entry.key.startswith(CLOCK_PREFIX)]
        self._place.delete([entry.key for entry in clocks if abs(self.now_s() - entry.modified_s) > age_s])


class Expiry:
    """Which files of a place their owners have not written again for too long.

    Args:
        expire_s: from when on that is too long.
    """

    def __init__(self, clock: Clock, expire_s: float) -> None:
        self._clock, self.expire_s = clock, expire_s
        self._seen: dict[str, tuple[float, float]] = {}  # key → when it was written, and since when we know

    def has_expired(self, key: str, modified_s: float) -> bool:
        """Whether a file has expired that was last written at a time by the clock of the place."""
        now_s, age_s = time.monotonic(), self.age_s(modified_s)
        written_s, since_s = self._seen.get(key, (modified_s, now_s))
        if written_s != modified_s:
            since_s = now_s
        self._seen[key] = (modified_s, since_s)
        if now_s - since_s > self.expire_s:
            return True
        return age_s > self.expire_s and now_s - self._clock.jumped_s > self.expire_s

    def age_s(self, modified_s: float) -> float:
        """Seconds since a time by the clock of the place."""
        return self._clock.now_s() - modified_s
