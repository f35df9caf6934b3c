"""Runs that share a stream of batches, epoch by epoch, each in its own folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from cache_tools.console import Progress
from train.feed import Feed
from train.logs import RunLog
from train.one_run import Run
from train.result import RunResult
from train.together import train_epoch_together


def train_group(
    runs: Sequence[Run], feed: Feed, title: str, *, until: int | None = None
) -> list[RunResult | Exception | None]:
    """Train what is left of every run; runs that are ahead wait for the others.

    Args:
        runs: of one batch stream (`together.train_epoch_together`) and with the same number of epochs.
        title: of the progress bar.
        until: stop after so many epochs; None goes to the end.

    Returns:
        For each run its result, None if it is not finished yet, or what stopped it: the others are not affected.
    """
    stopped: dict[int, Exception] = {}
    samples, epochs = feed.samples_per_epoch, min(until or runs[0].recipe.epochs, runs[0].recipe.epochs)
    first = min(len(run.history) for run in runs)
    with ExitStack() as stack:
        logs = [stack.enter_context(RunLog(run.path, run.recipe, run.history)) for run in runs]
        progress = stack.enter_context(Progress(title, epochs * samples, "images", done=first * samples))
        for epoch in range(first, epochs):
            due = [number for number, run in enumerate(runs) if len(run.history) == epoch and number not in stopped]
            if not due:
                break
            start = time.perf_counter()
            outcomes = train_epoch_together([runs[number].learner for number in due], feed, epoch, progress.advance)
            train_s = (time.perf_counter() - start) / len(due)
            for number, means in zip(due, outcomes, strict=True):
                if isinstance(means, Exception):
                    stopped[number] = means
                    continue
                row = runs[number].finish_epoch(means, train_s, samples)
                logs[number].write(runs[number].history)
                progress.advance(0, _note(row, epochs))
        return [
            stopped[number] if number in stopped else log.finish(run.result()) if run.finished else None
            for number, (run, log) in enumerate(zip(runs, logs, strict=True))
        ]


def _note(row: dict[str, Any], epochs: int) -> str:
    top1 = "" if row["test_top1"] is None else f", test top-1 {row['test_top1']:.2%}"
    return f"epoch {row['epoch'] + 1}/{epochs}: loss {row['loss']:.4f}{top1}"
