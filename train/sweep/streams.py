"""Trials that share a batch stream: which ones do, and how they are trained side by side.

A trial succeeds or fails on its own; its result or failure is in its folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.console import warn
from cache_tools.errors import CacheError, DivergedError, OutOfMemoryError, RecipeError
from cache_tools.format.manifest import Manifest
from cache_tools.images import open_images
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.reader import TeacherCache
from cache_tools.system.memory import drop_tracebacks, release_memory
from cache_tools.units import counted
from cache_tools.views.recipe import ViewRecipe
from train.data import Opener, TrainingData, open_data
from train.feed import CachedTargets, Feed, memory_shares
from train.loop import explain_failure, repeatable
from train.recipe.pixels import PixelRecipe
from train.run import Run, claimed_run, print_served, run_device, train_group
from train.runs.outcome import Failure, is_settled
from train.runs.result import RunResult
from train.sweep.halving import Halving
from train.sweep.recipe import Trial

_OpenTrial = tuple[Trial, TrainingData]


def batch_streams(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Group trials that can be trained side by side, in the order of each group's first trial.

    Trials of a group have the same images and views in the same order, the same batch size, number of epochs and
    device, and the same fusion of the same cache. Trials on labels alone join a cache with the same dataset and views.
    """
    manifests: dict[str, Manifest] = {}
    streams: dict[str, list[Trial]] = {}
    for trial in trials:
        streams.setdefault(_stream_key(trial, manifests), []).append(trial)
    return [group for stream in streams.values() for group in _by_targets(stream)]


def train_stream(
    trials: Sequence[Trial],
    *,
    halving: Halving | None = None,
    open_split: Opener = open_images,
    workers: tuple[int, int] = (1, 1),
    after_epoch: Callable[[], None] | None = None,
    keeps_memory_failures: bool = True,
) -> None:
    """Train the trials of one batch stream, each in its folder; a failed trial leaves `failed.json` there.

    Args:
        trials: one group of `batch_streams`.
        halving: stops trials early; None trains all of them to the end.
        open_split: opens the images of a split.
        workers: processes like this one on the same machine, and on the same device, which share their memory.
        after_epoch: called after each epoch of the trials.
        keeps_memory_failures: a trial that runs out of memory alone has failed; False to raise instead.

    Raises:
        OutOfMemoryError: without `keeps_memory_failures`.
        CacheError: an error that concerns all of them: no such cache, other images than the cache's, a full disk.
    """
    device = run_device(trials[0].recipe)
    if trials[0].recipe.follow:
        raise RecipeError(
            "the trials of a sweep need a complete cache",
            where="follow",
            next_step="leave it out, or train one student",
        )
    pixels = memory_shares(trials[0].recipe.pixels, device, *workers)
    with ExitStack() as stack:
        opened = []
        for trial in trials:
            opened.append((trial, open_data(trial.recipe, device, open_split)))
            stack.callback(opened[-1][1].targets.close)
        lead = next((data for _, data in opened if data.cache is not None), opened[0][1])
        together = [one for one in opened if _has_same_images(one[1], lead)]
        apart = [one for one in opened if not _has_same_images(one[1], lead)]
        options = _Options(device, halving, pixels, after_epoch, keeps_memory_failures)
        _train(together, lead, options)
        for trial, data in apart:  # on labels alone, with a dataset in another order than the cache
            _train([(trial, data)], data, options)


def image_opener() -> Opener:
    """A function like `open_images` that opens each split once."""
    opened: dict[str, ImageSet] = {}

    def open_split(dataset: DatasetRecipe, split: str | None) -> ImageSet:
        key = f"{dataset.model_dump_json()} {split}"
        if key not in opened:
            opened[key] = open_images(dataset, split)
        return opened[key]

    return open_split


def _stream_key(trial: Trial, manifests: dict[str, Manifest]) -> str:
    """Everything that trials of one stream have in common, as text."""
    recipe = trial.recipe
    if recipe.loss.needs_targets:
        assert recipe.cache is not None, "a recipe with targets has a cache"
        if recipe.cache not in manifests:
            manifests[recipe.cache] = TeacherCache.open(recipe.cache).manifest
        manifest = manifests[recipe.cache]
        dataset: DatasetRecipe = recipe.cached_dataset(manifest)
        views: ViewRecipe = manifest.recipe.views
        num_views: int | None = recipe.num_views or manifest.num_views
    else:
        dataset, views, num_views = recipe.own_dataset(), recipe.own_views(), recipe.num_views
    shared = (
        recipe.epochs,
        recipe.batch_size,
        recipe.seed,
        recipe.shuffle_window,
        recipe.device,
        recipe.deterministic,
        recipe.compile == "step",  # a batch is either a graph of every student, or plain steps
        (recipe.label_fraction, recipe.label_seed, recipe.label_fraction < 1.0 and recipe.loss.needs_targets),
        dataset.model_dump(mode="json"),
        views.model_dump(mode="json"),
        num_views,
    )
    return json.dumps(shared, sort_keys=True)


def _by_targets(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Split a stream by cache and fusion; trials without targets join the first group."""
    groups: dict[str, list[Trial]] = {}
    without_targets = [trial for trial in trials if not trial.recipe.loss.needs_targets]
    for trial in trials:
        if trial.recipe.loss.needs_targets:
            key = f"{trial.recipe.cache} {trial.recipe.fusion.model_dump_json()}"
            groups.setdefault(key, []).append(trial)
    if not groups:
        return [without_targets]
    first, *others = groups.values()
    return [sorted([*first, *without_targets], key=lambda trial: trial.number), *others]


class _Options(NamedTuple):
    """How the trials of a stream are trained; see `train_stream`."""

    device: torch.device
    halving: Halving | None
    pixels: PixelRecipe
    after_epoch: Callable[[], None] | None
    keeps_memory_failures: bool


def _train(opened: Sequence[_OpenTrial], lead: TrainingData, options: _Options) -> None:
    """Train trials side by side, and those that ran out of memory again, fewer at a time."""
    waiting = [opened]
    while waiting:
        group = waiting.pop(0)
        out_of_memory = _train_side_by_side(group, lead, options)
        if out_of_memory:
            names = ", ".join(trial.name for trial, _ in out_of_memory)
            warn(f"too little memory for {len(group)} trials side by side, later and fewer at a time: {names}")
            release_memory(options.device)
            smaller = len(out_of_memory) < len(group)
            half = len(out_of_memory) if smaller else (len(out_of_memory) + 1) // 2
            waiting += [part for part in (out_of_memory[:half], out_of_memory[half:]) if part]


def _train_side_by_side(opened: Sequence[_OpenTrial], lead: TrainingData, options: _Options) -> list[_OpenTrial]:
    """Train trials on one stream and save the failures.

    Returns:
        The trials that ran out of memory beside others; their failure is not saved.
    """
    first, device = opened[0][0].recipe, options.device
    targets = _shared_targets(opened, lead, device)
    failures: list[tuple[_OpenTrial, Exception]] = []
    with ExitStack() as stack:
        stack.enter_context(repeatable(device, first.deterministic))
        feed = replace(lead, targets=targets).feed(first, device, options.pixels)
        stack.callback(feed.close)
        print_served(feed)
        runs: list[tuple[_OpenTrial, Run]] = []
        for trial, data in opened:
            path, digest = stack.enter_context(claimed_run(data, trial.recipe))
            if is_settled(path):
                continue
            try:
                with explain_failure(trial.recipe, device):
                    run = Run(data, trial.recipe, device, path, digest, feed.steps_per_epoch, pixels=feed.served)
                runs.append(((trial, data), run))
            except Exception as error:  # no such student, no memory
                failures.append(((trial, data), drop_tracebacks(error)))
        outcomes = _outcomes([run for _, run in runs], feed, options)
    failures += [
        (one, outcome) for (one, _), outcome in zip(runs, outcomes, strict=True) if isinstance(outcome, Exception)
    ]
    out_of_memory = []
    for one, failure in failures:
        if len(opened) > 1 and isinstance(failure, OutOfMemoryError):
            out_of_memory.append(one)
        elif isinstance(failure, OutOfMemoryError) and not options.keeps_memory_failures:
            raise failure
        else:
            _save_failure(one[0].folder, failure)
    return out_of_memory


def _outcomes(runs: Sequence[Run], feed: Feed, options: _Options) -> list[RunResult | Exception | None]:
    if not runs:
        return []
    names = ", ".join(dict.fromkeys(run.recipe.student for run in runs))
    title = f"{counted(len(runs), 'trial')}, seed {runs[0].recipe.seed}: {names}"[:72]
    stop = None if options.halving is None else options.halving.stop
    return train_group(runs, feed, title, stop=stop, after_epoch=options.after_epoch)


def _shared_targets(opened: Sequence[_OpenTrial], lead: TrainingData, device: torch.device) -> Any:
    """One source with all the targets that any of the trials needs."""
    if lead.cache is None:
        return lead.targets
    with_targets = [(trial, data) for trial, data in opened if data.cache is not None]
    sparse = [data.targets.sparse_temperature for _, data in with_targets if isinstance(data.targets, CachedTargets)]
    return CachedTargets(
        lead.cache,
        device,
        logits=any(trial.recipe.loss.needs_logits for trial, _ in with_targets),
        features=any(trial.recipe.loss.needs_features and data.components is None for trial, data in with_targets),
        components=any(data.components is not None for _, data in with_targets),
        fusion=with_targets[0][0].recipe.fusion.resolve(lead.cache),
        sparse_temperature=next((temperature for temperature in sparse if temperature is not None), None),
    )


def _has_same_images(data: TrainingData, lead: TrainingData) -> bool:
    same = data.images.content_digest == lead.images.content_digest and len(data.images) == len(lead.images)
    return same and _equal(data.samples, lead.samples)


def _equal(one: npt.NDArray[np.int64] | None, other: npt.NDArray[np.int64] | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def _save_failure(folder: Path, error: Exception) -> None:
    text = str(error).strip().splitlines()[0] if str(error).strip() else "no details"
    message = str(error) if isinstance(error, CacheError) else f"{type(error).__name__}: {text[:300]}"
    kind = (
        "diverged" if isinstance(error, DivergedError) else "memory" if isinstance(error, OutOfMemoryError) else "error"
    )
    Failure(kind=kind, message=message).save(folder)
