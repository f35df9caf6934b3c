"""Run a sweep on this machine: streams of batches one after the other, or shared out to processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch

from cache_tools.config import Frozen, dump_yaml
from cache_tools.errors import DeviceError, RecipeError
from cache_tools.files import put_durably
from cache_tools.reader import TeacherCache
from train.checkpoints import load_student
from train.cost import Cost, measure
from train.data import cache_identity
from train.report.html import write_report
from train.report.trials import save_table
from train.run import run_device
from train.runs import trackers
from train.runs.folder import FAILED, REPORT, differences, forget, stored_identity, worth_keeping
from train.runs.outcome import settled
from train.runs.result import load_result
from train.students import create_student
from train.sweep.halving import Asha, Contest, check_metric, forget_other_contests
from train.sweep.recipe import SweepRecipe, Trial, make_trial, make_trials
from train.sweep.search import Best, run_search
from train.sweep.search_recipe import edges
from train.sweep.streams import batch_streams, opener, train_stream
from train.sweep.suggest import check_installed
from train.sweep.table import over_seeds, trials_table

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
        trackers.chosen(trial.recipe)  # and a missing package too
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


NAMED = 3  # trials in an error


def reopen(trials: Sequence[Trial], asha: Asha | None, *, retry_failed: bool = False, overwrite: bool = False) -> None:
    """Let those go on that are to be tried again.

    Args:
        asha: rules of the contest; trials that others stopped go on.
        retry_failed: forget failures.
        overwrite: forget runs of other settings, or from another cache.

    Raises:
        RecipeError: there are such runs, and they are not to be forgotten.
    """
    kept = [trial for trial in trials if worth_keeping(trial.folder) or (not retry_failed and settled(trial.folder))]
    other = _other_runs(kept)
    if other and not overwrite:
        told = [f"{trial.name}: {', '.join(found)}" for trial, found in other[:NAMED]]
        more = [f"and {len(other) - NAMED} more trials"] if len(other) > NAMED else []
        raise RecipeError(
            "other runs are stored in the folders of the trials",
            where=other[0][0].folder.parent,
            expected="the same settings and data",
            found="; ".join(told + more),
            next_step="choose another --out, or train these trials again with --overwrite",
        )
    for trial, _ in other:
        forget(trial.folder)
    forget_other_contests(trials, asha)
    if retry_failed:
        for trial in trials:
            (trial.folder / FAILED).unlink(missing_ok=True)


def _other_runs(trials: Sequence[Trial]) -> list[tuple[Trial, list[str]]]:
    """Trials in whose folders is something else, with what they do not have in common."""
    caches: dict[str, TeacherCache] = {}
    found = []
    for trial in trials:
        stored = stored_identity(trial.folder)
        wanted = {"recipe": json.loads(json.dumps(trial.recipe.values())), "data": _data(trial, stored, caches)}
        if different := differences(stored, wanted):
            found.append((trial, different))
    return found


def _data(trial: Trial, stored: dict[str, Any] | None, caches: dict[str, TeacherCache]) -> Any:
    """What tells the data of a trial apart; what is stored where it takes the images themselves to know."""
    recipe = trial.recipe
    if not recipe.loss.needs_targets:
        return None if stored is None else stored["data"]
    assert recipe.cache is not None, "a recipe with targets has a cache"
    if recipe.cache not in caches:
        caches[recipe.cache] = TeacherCache.open(recipe.cache)
    return cache_identity(caches[recipe.cache], recipe)
