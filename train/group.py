"""Runs that share a stream of batches, epoch by epoch, each in its own folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cache_tools.console import Progress
from cache_tools.errors import StorageError
from train.feed import Feed
from train.logs import RunLog
from train.one_run import Run
from train.result import RunResult
from train.together import train_epoch_together

Outcome = TypeVar("Outcome")
Referee = Callable[[int, Sequence[Path]], set[Path]]
"""Told how many epochs the runs in some folders have finished; says which of them stop there."""


def train_group(
    runs: Sequence[Run], feed: Feed, title: str, *, referee: Referee = lambda epochs, folders: set()
) -> list[RunResult | Exception | None]:
    """Train what is left of every run; runs that are ahead wait for the others.

    Args:
        runs: of one batch stream (`together.train_epoch_together`) and with the same number of epochs.
        title: of the progress bar.
        referee: asked before every epoch about the runs that would train in it.

    Returns:
        For each run its result, None if the referee stopped it, or the error that did: the others are not affected.

    Raises:
        StorageError, OSError: what a run leaves cannot be written.
    """
    outcomes: dict[int, RunResult | Exception | None] = {}  # what has ended
    samples, epochs = feed.samples_per_epoch, runs[0].recipe.epochs
    first = min(len(run.history) for run in runs)
    with ExitStack() as stack:
        logs = [stack.enter_context(RunLog(run.path, run.recipe, run.history)) for run in runs]
        progress = stack.enter_context(Progress(title, epochs * samples, "images", done=first * samples))

        def judge(epoch: int) -> None:
            """Drop the runs that stop after so many finished epochs."""
            standing = {run.path: number for number, run in enumerate(runs) if len(run.history) == epoch < epochs}
            standing = {path: number for path, number in standing.items() if number not in outcomes}
            outcomes.update({standing[path]: None for path in (referee(epoch, list(standing)) if standing else ())})

        for epoch in range(first, epochs):
            judge(epoch)
            due = [number for number, run in enumerate(runs) if len(run.history) == epoch and number not in outcomes]
            if not due:
                continue
            start = time.perf_counter()
            means = train_epoch_together([runs[number].learner for number in due], feed, epoch, progress.advance)
            train_s = (time.perf_counter() - start) / len(due)
            for number, mean in zip(due, means, strict=True):
                if isinstance(mean, Exception):
                    outcomes[number] = mean
                    continue
                row = _or_error(partial(runs[number].finish_epoch, mean, train_s, samples), alone=len(runs) == 1)
                if isinstance(row, Exception):
                    outcomes[number] = row
                    continue
                logs[number].write(runs[number].history)
                progress.advance(0, _note(row, epochs))
        for number, (run, log) in enumerate(zip(runs, logs, strict=True)):
            if number not in outcomes:
                result = _or_error(run.result, alone=len(runs) == 1)
                outcomes[number] = result if isinstance(result, Exception) else log.finish(result)
        return [outcomes[number] for number in range(len(runs))]


def _or_error(work: Callable[[], Outcome], *, alone: bool) -> Outcome | Exception:
    """What `work` gives, or the error that concerns no other run: logits that are no numbers, memory, …"""
    try:
        return work()
    except (StorageError, OSError):
        raise
    except Exception as error:
        return error if alone else error.with_traceback(None)  # which holds tensors, and others need the memory


def _note(row: dict[str, Any], epochs: int) -> str:
    top1 = "" if row["test_top1"] is None else f", test top-1 {row['test_top1']:.2%}"
    return f"epoch {row['epoch'] + 1}/{epochs}: loss {row['loss']:.4f}{top1}"
