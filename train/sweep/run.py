"""Run a sweep: check it, train the trials that are not settled, write the table and the page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch

from cache_tools.config import Frozen, dump_yaml
from cache_tools.errors import DeviceError, RecipeError
from cache_tools.files import SafeFolder
from cache_tools.reader import TeacherCache
from train.checkpoints import load_student
from train.cost import BATCH_SIZES, Cost, measure
from train.data import cache_identity
from train.initial import check_names
from train.report.html import write_report
from train.report.trials import save_table
from train.run import print_stage, run_device
from train.runs import trackers
from train.runs.folder import FAILED, REPORT, differences, is_worth_keeping, remove_run, stored_identity
from train.runs.outcome import is_settled
from train.runs.result import load_result
from train.sweep.halving import Halving, check_metric, resume_stopped
from train.sweep.recipe import Asha, SweepRecipe, Trial, make_trial, make_trials
from train.sweep.search import Best, run_search
from train.sweep.search_recipe import edges
from train.sweep.streams import batch_streams, image_opener, train_stream
from train.sweep.suggest import check_installed
from train.sweep.table import over_seeds, trials_table
from train.weights.run_files import (
    SWEEP,
    TRIALS,
    TRIALS_TABLE,
    read_file,
    real_folder,
    remove_file,
    run_files,
    write_file,
)

COSTS = "costs.json"
# Of the engines (`train.sweep.workers`, `train.sweep.packed`, `train.sweep.ray`).
WORKERS_LOG, MEMORY, RAY = "workers.log", "memory.json", "ray"
_NAMED_IN_ERROR = 3

Engine = Callable[[Sequence[Sequence[Trial]], Halving | None], None]
"""Trains trials, given as batch streams, with or without halving. Their results and failures are in their folders."""


class SweepResult(NamedTuple):
    """The result of a sweep: its `trials_table`, the table's `over_seeds`, and the best trial of a search.

    Attributes:
        pixels: where the pixels of its trials were, one line for each place.
    """

    folder: Path
    trials: pl.DataFrame
    settings: pl.DataFrame
    best: Best | None = None
    pixels: tuple[str, ...] = ()


def run_sweep(
    sweep: SweepRecipe,
    folder: Path,
    *,
    engine: Engine | None = None,
    retry_failed: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> SweepResult:
    """Train the trials of a sweep that are not finished, failed or stopped.

    Args:
        folder: of the sweep; the run folders of its trials are in `trials` below it.
        engine: trains the trials; None trains them in this process.
        retry_failed: train failed trials again.
        overwrite: replace runs of other settings, or of another cache, in the trials' folders.
        say: receives one line per milestone.

    Raises:
        RecipeError: runs of other settings, or of another cache, in the trials' folders.
        CacheError: an error that concerns all trials: recipe, cache, images, storage.
    """
    trials = _checked_trials(sweep, folder)
    train = engine or train_in_process
    best = None

    def open_folders(new: Sequence[Trial]) -> None:
        _refuse_unsafe(folder, new)
        reopen(new, sweep.asha, retry_failed=retry_failed, overwrite=overwrite)
        write_file(folder / SWEEP, dump_yaml(sweep).encode())
        SafeFolder(folder).remove_partials()  # left by a killed sweep

    if sweep.search is None:
        open_folders(trials)
        num_settled = sum(is_settled(trial.folder) for trial in trials)
        say(f"{len(trials)} trial{'s' if len(trials) > 1 else ''}, {num_settled} done, in {folder}")
        _train(trials, trials, sweep, train)
    else:
        say(f"a search of {sweep.search.trials} trials in {folder}")

        def train_new(new: Sequence[Trial], earlier: Sequence[Trial]) -> None:
            open_folders(new)
            _train(new, [*earlier, *new], sweep, train)

        trials, best = run_search(sweep, folder, train_new, say)
    table = trials_table(trials, _costs(trials, folder))
    save_table(table, folder)
    results = [load_result(trial.folder) for trial in trials]
    for note in dict.fromkeys(note for result in results if result is not None for note in result.notes):
        say(f"note: {note}")
    pixels = tuple(dict.fromkeys(result.pixels for result in results if result is not None and result.pixels))
    for line in pixels if engine is not None else ():  # the processes have printed it to their logs
        say(line)
    write_report([], folder / REPORT, trials=table, title=f"Sweep {sweep.name}")
    return SweepResult(folder, table, over_seeds(table), best, pixels)


def train_in_process(streams: Sequence[Sequence[Trial]], halving: Halving | None) -> None:
    """The engine that trains one stream after the other in this process."""
    open_split = image_opener()
    for stream in streams:
        train_stream(stream, halving=halving, open_split=open_split)


def default_workers(device: torch.device) -> int:
    """As many processes as fill the CPU, each with as many threads as this one; a single one elsewhere."""
    return 1 if device.type != "cpu" else max(1, (os.cpu_count() or 1) // torch.get_num_threads())


def reopen(trials: Sequence[Trial], asha: Asha | None, *, retry_failed: bool = False, overwrite: bool = False) -> None:
    """Check what is stored in the folders of trials, and reset those that are to be trained again.

    Args:
        asha: halving of this sweep; trials that other rules stopped continue.
        retry_failed: remove the record of failures.
        overwrite: remove runs of other settings, or of another cache.

    Raises:
        RecipeError: such runs without `overwrite`.
    """
    kept = [
        trial for trial in trials if is_worth_keeping(trial.folder) or (not retry_failed and is_settled(trial.folder))
    ]
    others = _other_runs(kept)
    if others and not overwrite:
        named = [f"{trial.name}: {', '.join(found)}" for trial, found in others[:_NAMED_IN_ERROR]]
        more = [f"and {len(others) - _NAMED_IN_ERROR} more trials"] if len(others) > _NAMED_IN_ERROR else []
        raise RecipeError(
            "other runs are stored in the folders of the trials",
            where=others[0][0].folder.parent,
            expected="the same settings and data",
            found="; ".join(named + more),
            next_step="choose another --out, or train these trials again with --overwrite",
        )
    for trial, _ in others:
        remove_run(trial.folder)
    resume_stopped(trials, asha)
    if retry_failed:
        for trial in trials:
            remove_file(trial.folder / FAILED)


def _refuse_unsafe(folder: Path, trials: Sequence[Trial]) -> None:
    """Make the folder of a sweep, and refuse links, pipes and devices in it now, and not after its training.

    Raises:
        FormatError: one of them in place of a file or folder of the sweep.
        StorageError: a file where a folder should be.
    """
    trials_folder, files = real_folder(folder, TRIALS), run_files(folder)
    logs = [f"{RAY}/{entry.name}" for entry in (files.entries(RAY) if files.exists(RAY) else ()) if not entry.is_folder]
    for name in (TRIALS_TABLE, COSTS, REPORT, WORKERS_LOG, MEMORY, *logs):
        if files.exists(name):
            files.open_read(name).close()  # raises for anything else than a file
    for trial in trials:
        if trials_folder.exists(trial.folder.name):
            trials_folder.names(trial.folder.name)  # raises for anything else than a folder


def _checked_trials(sweep: SweepRecipe, folder: Path) -> list[Trial]:
    """The trials of a sweep, or those at the edges of a search's space. Errors show now, before anything is trained."""
    if sweep.search is None:
        trials = make_trials(sweep, folder)
    else:
        check_installed()
        trials = [make_trial(sweep, settings, folder) for settings in edges(sweep.space())]
        check_metric(sweep.search.metric, trials, "search")
    for recipe in {(each.recipe.student, each.recipe.initial_weights): each.recipe for each in trials}.values():
        check_names(recipe)
    for trial in trials:
        trackers.choose_trackers(trial.recipe)
    if sweep.asha is not None:
        Halving.of_trials(trials, sweep.asha)
    batch_streams(trials)
    return trials


def _train(trials: Sequence[Trial], compared: Sequence[Trial], sweep: SweepRecipe, train: Engine) -> None:
    """Train the trials that are not settled; halving compares them with all of `compared`."""
    unsettled = [trial for trial in trials if not is_settled(trial.folder)]
    if unsettled:
        halving = None if sweep.asha is None else Halving.of_trials(compared, sweep.asha)
        with _stages_kept(unsettled):
            train(batch_streams(unsettled), halving)


@contextmanager
def _stages_kept(trials: Sequence[Trial]) -> Iterator[None]:
    """Keep staged views from one trial to the next: the last process that uses a stage removes it."""
    budgets = {trial.recipe.cache: trial.recipe.stage_budget for trial in trials if trial.recipe.stage_budget}
    with ExitStack() as stack:
        for cache, budget in budgets.items():
            assert cache is not None, "a recipe with a stage budget has a cache"
            opened = stack.enter_context(closing(TeacherCache.open(cache, stage_budget=budget)))
            print_stage(opened)
        yield


def _other_runs(trials: Sequence[Trial]) -> list[tuple[Trial, list[str]]]:
    """Trials whose folders hold another run, each with what differs."""
    caches: dict[str, TeacherCache] = {}
    found = []
    for trial in trials:
        stored = stored_identity(trial.folder)
        wanted = {"recipe": json.loads(json.dumps(trial.recipe.values())), "data": _data(trial, stored, caches)}
        if different := differences(stored, wanted):
            found.append((trial, different))
    return found


def _data(trial: Trial, stored: dict[str, Any] | None, caches: dict[str, TeacherCache]) -> Any:
    """The identity of a trial's data. Without a cache the stored one is used: the images are not opened."""
    recipe = trial.recipe
    if not recipe.loss.needs_targets:
        return None if stored is None else stored["data"]
    assert recipe.cache is not None, "a recipe with targets has a cache"
    if recipe.cache not in caches:
        caches[recipe.cache] = TeacherCache.open(recipe.cache)
    return cache_identity(caches[recipe.cache], recipe)


class _CostsFile(Frozen):
    costs: dict[str, Cost]


def _costs(trials: Sequence[Trial], folder: Path) -> dict[str, Cost]:
    """The cost of each student with a finished trial, measured once and stored in the sweep's folder."""
    file = folder / COSTS
    stored = _stored_costs(file)
    costs = dict(stored)
    for trial in trials:
        if trial.recipe.student in costs or load_result(trial.folder) is None:
            continue
        try:
            device = run_device(trial.recipe)
        except DeviceError:  # a cluster trains on GPUs that this machine may not have
            device = torch.device("cpu")
        student, card = load_student(trial.folder, device)
        costs[trial.recipe.student] = measure(student, card.image_size, device)
    if costs != stored:
        write_file(file, _CostsFile(costs=costs).model_dump_json(indent=2).encode())
    return costs


def _stored_costs(file: Path) -> dict[str, Cost]:
    """Costs from the file; none if it is missing or damaged, and they are measured again."""
    try:
        costs = _CostsFile.model_validate_json(read_file(file) or b"").costs
    except ValueError:
        return {}
    return {name: cost for name, cost in costs.items() if {*BATCH_SIZES} <= {one.batch_size for one in cost.latency}}
