"""Progress of a sweep whose trials are trained in other processes, read from the trials' folders."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cache_tools.console import Progress
from train.runs.metrics import epochs_logged
from train.runs.outcome import is_settled
from train.sweep.recipe import Trial

READ_EVERY_S = 2.0


class SweepProgress(Progress):
    """A progress bar over the epochs of all trials, with the number of settled trials."""

    def __init__(self, title: str, trials: Sequence[Trial]) -> None:
        self._unsettled, self._num_trials, self._read_at = list(trials), len(trials), time.monotonic()
        done = self._epochs_done(trials)
        self._settled_epochs = 0
        super().__init__(title, sum(trial.recipe.epochs for trial in trials), "epochs", done=done)

    def update(self) -> None:
        """Show the progress so far. Cheap to call often: it reads files every two seconds at most."""
        if time.monotonic() - self._read_at >= READ_EVERY_S:
            self._update()

    def __exit__(self, *error: Any) -> None:
        self._update(last=True)
        super().__exit__(*error)

    def _update(self, *, last: bool = False) -> None:
        self._read_at = time.monotonic()
        for trial in [trial for trial in self._unsettled if is_settled(trial.folder)]:
            self._unsettled.remove(trial)
            self._settled_epochs += trial.recipe.epochs  # a failed or stopped trial has no epochs left to train
        done = self._settled_epochs + self._epochs_done(self._unsettled)
        note = f"{self._num_trials - len(self._unsettled)} of {self._num_trials} trials done"
        if last and self._bar is None:  # without a bar, leaving prints a line
            self.done, self._note = done, note
        elif done > self.done or last:  # in a log, print a line only if something changed
            self.advance(max(0, done - self.done), note)

    @staticmethod
    def _epochs_done(trials: Sequence[Trial]) -> int:
        return sum(epochs_logged(trial.folder) for trial in trials)
