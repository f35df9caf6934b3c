"""How far a sweep is whose trials are trained elsewhere: read from their folders."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cache_tools.console import Progress
from train.runs.metrics import epochs_logged
from train.runs.outcome import settled
from train.sweep.recipe import Trial

LOOK_EVERY_S = 2.0


class SweepProgress(Progress):
    """A progress bar in epochs over all trials, with how many of them are settled; `look` as often as you like."""

    def __init__(self, title: str, trials: Sequence[Trial]) -> None:
        self._open, self._trials, self._looked = list(trials), len(trials), time.monotonic()
        done = self._epochs_done(trials)
        self._closed = 0
        super().__init__(title, sum(trial.recipe.epochs for trial in trials), "epochs", done=done)

    def look(self) -> None:
        """Show what has been done since; reads files no more often than every two seconds."""
        if time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._look()

    def __exit__(self, *error: Any) -> None:
        self._look(last=True)
        super().__exit__(*error)

    def _look(self, *, last: bool = False) -> None:
        self._looked = time.monotonic()
        for trial in [trial for trial in self._open if settled(trial.folder)]:
            self._open.remove(trial)
            self._closed += trial.recipe.epochs  # one that failed or was stopped has nothing left to do
        done = self._closed + self._epochs_done(self._open)
        note = f"{self._trials - len(self._open)} of {self._trials} trials done"
        if last and self._bar is None:  # a line follows anyway
            self.done, self._note = done, note
        elif done > self.done or last:  # an epoch may take minutes, and a line that says nothing new is noise
            self.advance(max(0, done - self.done), note)

    @staticmethod
    def _epochs_done(trials: Sequence[Trial]) -> int:
        return sum(epochs_logged(trial.folder) for trial in trials)
