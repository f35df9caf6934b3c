"""The time that epochs take, and when a checkpoint inside them is due."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence


class EpochClock:
    """Measures epochs of runs that train together, which share the time of the process equally.

    Args:
        every_minutes: how often each run wants checkpoints; None for never.

    Attributes:
        stores_checkpoints: whether any run wants them.
    """

    def __init__(self, every_minutes: Iterable[float | None]) -> None:
        self._every_s = 60.0 * min((each for each in every_minutes if each is not None), default=float("inf"))
        self.stores_checkpoints = self._every_s < float("inf")
        self._before_s: Sequence[float] = ()
        self._start = self._saved = 0.0

    def begin_epoch(self, before_s: Sequence[float]) -> None:
        """Start an epoch; `before_s` is the time that each run has spent in it before, up to its checkpoint."""
        self._before_s = before_s
        self._start = self._saved = time.perf_counter()

    def train_s(self) -> list[float]:
        """The time that the epoch has taken each run so far."""
        own_s = (time.perf_counter() - self._start) / len(self._before_s)
        return [before_s + own_s for before_s in self._before_s]

    def is_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.perf_counter() - self._saved >= self._every_s

    def restart(self) -> None:
        """Count the time to the next checkpoint from now."""
        self._saved = time.perf_counter()
