"""Run a sweep on this machine: streams of batches one after the other, or shared out to processes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl
import torch

from cache_tools.config import Frozen, dump_yaml
from cache_tools.durable import put_durably
from cache_tools.errors import RecipeError
from train import loggers
from train.checkpoints import load_student
from train.cost import Cost, measure
from train.failure import FAILED, load_failure
from train.folder import REPORT
from train.report import write_report
from train.result import load_result
from train.run import run_device
from train.students import create_student
from train.sweep_group import batch_streams, opener, train_stream
from train.sweep_recipe import Halving, SweepRecipe, Trial, make_trials
from train.sweep_table import STOPPED, over_seeds, save_table, trials_table

SWEEP, COSTS = "sweep.yaml", "costs.json"

Engine = Callable[[Sequence[Sequence[Trial]], int | None], None]
"""Trains streams of trials up to some epoch (None: to the end); whatever a trial comes to is in its folder."""


class _CostsFile(Frozen):
    costs: dict[str, Cost]


class SweepResult(NamedTuple):
    """What a sweep came to: `trials_table` and `over_seeds` of it."""

    folder: Path
    trials: pl.DataFrame
    settings: pl.DataFrame


def run_sweep(
    sweep: SweepRecipe,
    folder: Path,
    *,
    engine: Engine | None = None,
    retry_failed: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> SweepResult:
    """Train what is not finished of a sweep; trials that failed or were stopped are left so.

    Args:
        folder: of the sweep; trials have their run folders in `trials` below it.
        engine: who trains; None is this process.
        retry_failed: forget failures first.
        say: receives one line per milestone.

    Raises:
        CacheError: what concerns all trials: recipes, cache, images, storage.
    """
    trials = make_trials(sweep, folder)
    for student in dict.fromkeys(trial.recipe.student for trial in trials):
        with torch.device("meta"):  # a misspelt name shows now, not after the others are trained
            create_student(student, 10)
    for trial in trials:
        loggers.chosen(trial.recipe)  # and a missing package too
    folder.mkdir(parents=True, exist_ok=True)
    put_durably(folder / SWEEP, dump_yaml(sweep).encode())
    if retry_failed:
        for trial in trials:
            (_folder(trial) / FAILED).unlink(missing_ok=True)
    say(f"{len(trials)} trials, {sum(_done(trial) for trial in trials)} of them done, in {folder}")
    train = engine or in_process
    epochs = max(trial.recipe.epochs for trial in trials)
    for rung in sweep.halving.rungs(epochs) if sweep.halving else []:
        assert sweep.halving is not None, "there are no rungs without it"
        _train_rung(trials, rung, sweep.halving, train, folder, say)
    left = [trial for trial in trials if not _done(trial)]
    if left:
        train(batch_streams(left), None)
    table = trials_table(trials, _costs(trials, folder))
    save_table(table, folder)
    write_report([], folder / REPORT, trials=table, title=f"Sweep {sweep.name}")
    return SweepResult(folder, table, over_seeds(table))


def in_process(streams: Sequence[Sequence[Trial]], until: int | None) -> None:
    """Stream after stream in this process."""
    images_of = opener()
    for stream in streams:
        train_stream(stream, until=until, images_of=images_of)


def default_workers(device: torch.device) -> int:
    """Processes that fill the CPU, each with as many threads as this one has; one on a GPU."""
    return 1 if device.type == "cuda" else max(1, (os.cpu_count() or 1) // torch.get_num_threads())


def _train_rung(
    trials: Sequence[Trial], rung: int, halving: Halving, train: Engine, folder: Path, say: Callable[[str], None]
) -> None:
    """Train all that are left up to a rung, then stop all but the best."""
    left = [trial for trial in trials if not _done(trial)]
    behind = [trial for trial in left if _epochs_done(trial) < rung]
    if behind:
        train(batch_streams(behind), rung)
    scores = {trial.name: _score(trial, rung, halving) for trial in left if not _done(trial)}
    # A trial that had finished before (a sweep that has grown) competes too, but is never stopped.
    ranked = sorted(scores, key=lambda name: scores[name], reverse=halving.larger_is_better)
    keep = math.ceil(len(ranked) / halving.keep_one_in)
    for trial in left:
        if trial.name in ranked[keep:]:
            text = f'{{"epochs": {rung}, "{halving.metric}": {scores[trial.name]}}}'
            put_durably(_folder(trial) / STOPPED, text.encode())
    say(f"after {rung} epochs: {keep} of {len(ranked)} trials go on")
    save_table(trials_table(trials, {}), folder)


def _score(trial: Trial, rung: int, halving: Halving) -> float:
    """The metric at the last evaluated epoch up to the rung."""
    metrics = pl.read_parquet(_folder(trial) / "metrics.parquet").head(rung)
    if halving.metric not in metrics.columns:
        numbers = [name for name, dtype in metrics.schema.items() if dtype.is_numeric()]
        raise RecipeError("no such metric", where="halving.metric", expected=", ".join(numbers), found=halving.metric)
    values = metrics[halving.metric].drop_nulls()
    if values.is_empty():
        raise RecipeError(
            f"no {halving.metric} by epoch {rung}",
            where="halving",
            next_step="evaluate more often (--set evaluate_every=1), or begin later (--set halving.first_epochs=…)",
        )
    return float(values[-1])


def _costs(trials: Sequence[Trial], folder: Path) -> dict[str, Cost]:
    """What each student of a finished trial costs, measured once and kept in the sweep's folder."""
    file = folder / COSTS
    kept = _CostsFile.model_validate_json(file.read_bytes()).costs if file.exists() else {}
    costs = dict(kept)
    for trial in trials:
        if trial.recipe.student in costs or load_result(_folder(trial)) is None:
            continue
        device = run_device(trial.recipe)
        student, card = load_student(_folder(trial), device)
        costs[trial.recipe.student] = measure(student, card.image_size, device)
    if costs != kept:
        put_durably(file, _CostsFile(costs=costs).model_dump_json(indent=2).encode())
    return costs


def _done(trial: Trial) -> bool:
    folder = _folder(trial)
    return load_result(folder) is not None or load_failure(folder) is not None or (folder / STOPPED).exists()


def _epochs_done(trial: Trial) -> int:
    file = _folder(trial) / "metrics.parquet"
    return len(pl.read_parquet(file)) if file.exists() else 0


def _folder(trial: Trial) -> Path:
    assert trial.recipe.out is not None, "make_trials gives every trial its folder"
    return trial.recipe.out
