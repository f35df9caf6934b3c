"""Run a sweep on this machine: streams of batches one after the other, or shared out to processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl
import torch

from cache_tools.config import Frozen, dump_yaml
from cache_tools.durable import put_durably
from cache_tools.errors import DeviceError
from train import loggers
from train.checkpoints import load_student
from train.cost import Cost, measure
from train.folder import REPORT
from train.halving import Contest
from train.outcome import settled
from train.report import write_report
from train.result import load_result
from train.run import run_device
from train.search import Best, run_search
from train.search_recipe import edges
from train.students import create_student
from train.suggest import check_installed
from train.sweep_folders import reopen
from train.sweep_group import opener, train_stream
from train.sweep_metric import check_metric
from train.sweep_recipe import SweepRecipe, Trial, make_trial, make_trials
from train.sweep_streams import batch_streams
from train.sweep_table import over_seeds, save_table, trials_table

SWEEP, COSTS = "sweep.yaml", "costs.json"

Engine = Callable[[Sequence[Sequence[Trial]], Contest | None], None]
"""Trains streams of trials, all to the end or with a contest; whatever a trial comes to is in its folder."""


class _CostsFile(Frozen):
    costs: dict[str, Cost]


class SweepResult(NamedTuple):
    """What a sweep came to: `trials_table` and `over_seeds` of it; the best trial of a search."""

    folder: Path
    trials: pl.DataFrame
    settings: pl.DataFrame
    best: Best | None = None


def run_sweep(
    sweep: SweepRecipe,
    folder: Path,
    *,
    engine: Engine | None = None,
    retry_failed: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> SweepResult:
    """Train what is not finished of a sweep; trials that failed or were stopped are left so.

    Args:
        folder: of the sweep; trials have their run folders in `trials` below it.
        engine: who trains; None is this process.
        retry_failed: forget failures first.
        overwrite: forget what trials' folders hold of other settings, or from another cache.
        say: receives one line per milestone.

    Raises:
        RecipeError: runs of other settings, or from another cache, in the trials' folders.
        CacheError: what concerns all trials: recipes, cache, images, storage.
    """
    trials = _planned(sweep, folder)
    train, best = engine or in_process, None

    def begin(new: Sequence[Trial]) -> None:
        reopen(new, sweep.asha, retry_failed=retry_failed, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        put_durably(folder / SWEEP, dump_yaml(sweep).encode())

    if sweep.search is None:
        begin(trials)
        done = sum(settled(trial.folder) for trial in trials)
        say(f"{len(trials)} trial{'s' if len(trials) > 1 else ''}, {done} done, in {folder}")
        _train(trials, trials, sweep, train)
    else:
        say(f"a search of {sweep.search.trials} trials in {folder}")

        def train_new(new: Sequence[Trial], before: Sequence[Trial]) -> None:
            begin(new)
            _train(new, [*before, *new], sweep, train)

        trials, best = run_search(sweep, folder, train_new, say)
    table = trials_table(trials, _costs(trials, folder))
    save_table(table, folder)
    write_report([], folder / REPORT, trials=table, title=f"Sweep {sweep.name}")
    return SweepResult(folder, table, over_seeds(table), best)


def in_process(streams: Sequence[Sequence[Trial]], contest: Contest | None) -> None:
    """Stream after stream in this process."""
    images_of = opener()
    for stream in streams:
        train_stream(stream, contest=contest, images_of=images_of)


def default_workers(device: torch.device) -> int:
    """Processes that fill the CPU, each with as many threads as this one has; one on a GPU."""
    return 1 if device.type == "cuda" else max(1, (os.cpu_count() or 1) // torch.get_num_threads())


def _planned(sweep: SweepRecipe, folder: Path) -> list[Trial]:
    """The trials, of a search those at the edges of what it may come to, with all that is wrong in them told now."""
    if sweep.search is None:
        trials = make_trials(sweep, folder)
    else:
        check_installed()
        trials = [make_trial(sweep, settings, folder) for settings in edges(sweep.space())]
        check_metric(sweep.search.metric, trials, "search")
    for student in dict.fromkeys(trial.recipe.student for trial in trials):
        with torch.device("meta"):  # a misspelt name shows now, not after the others are trained
            create_student(student, 10)
    for trial in trials:
        loggers.chosen(trial.recipe)  # and a missing package too
    if sweep.asha is not None:
        Contest.among(trials, sweep.asha)  # and a rung without figures
    batch_streams(trials)  # and a cache that is not there
    return trials


def _train(trials: Sequence[Trial], competing: Sequence[Trial], sweep: SweepRecipe, train: Engine) -> None:
    """Train what is left of trials; those that compete have their say in who is stopped."""
    left = [trial for trial in trials if not settled(trial.folder)]
    if left:
        train(batch_streams(left), None if sweep.asha is None else Contest.among(competing, sweep.asha))


def _costs(trials: Sequence[Trial], folder: Path) -> dict[str, Cost]:
    """What each student of a finished trial costs, measured once and kept in the sweep's folder."""
    file = folder / COSTS
    kept = _kept_costs(file)
    costs = dict(kept)
    for trial in trials:
        if trial.recipe.student in costs or load_result(trial.folder) is None:
            continue
        try:
            device = run_device(trial.recipe)
        except DeviceError:  # a cluster trains on GPUs that this machine need not have
            device = torch.device("cpu")
        student, card = load_student(trial.folder, device)
        costs[trial.recipe.student] = measure(student, card.image_size, device)
    if costs != kept:
        put_durably(file, _CostsFile(costs=costs).model_dump_json(indent=2).encode())
    return costs


def _kept_costs(file: Path) -> dict[str, Cost]:
    """What was measured before; nothing if that is lost, and it is measured again."""
    try:
        return _CostsFile.model_validate_json(file.read_bytes()).costs
    except (FileNotFoundError, ValueError):
        return {}
