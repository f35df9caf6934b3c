"""Train the trials of a sweep that share a stream of batches; what one of them comes to is its own affair."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from cache_tools.console import warn
from cache_tools.errors import CacheError, DivergedError, OutOfMemoryError
from cache_tools.format.manifest import Manifest
from cache_tools.images import open_images
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.memory import drop_tracebacks, release_memory
from cache_tools.reader import TeacherCache
from cache_tools.views.recipe import ViewRecipe
from train.data import Opener, TrainingData, open_data
from train.feed import CachedTargets, Feed, open_feed
from train.loop import explain_out_of_memory, repeatable
from train.run import Run, claimed_run, run_device, train_group
from train.runs.outcome import Failure, settled
from train.runs.result import RunResult
from train.sweep.halving import Contest
from train.sweep.recipe import Trial

_KINDS: dict[type[Exception], str] = {DivergedError: "diverged", OutOfMemoryError: "memory"}
_Opened = tuple[Trial, TrainingData]


def train_stream(trials: Sequence[Trial], *, contest: Contest | None = None, images_of: Opener = open_images) -> None:
    """Train trials of one batch stream, each in its folder; one that fails leaves `failed.json` there.

    Args:
        trials: of one element of `sweep_streams.batch_streams`.
        contest: who competes for going on; None trains all to the end.

    Raises:
        CacheError: what concerns all of them: no such cache, other images than the cache's, a full disk.
    """
    device = run_device(trials[0].recipe)
    opened = [(trial, open_data(trial.recipe, device, images_of)) for trial in trials]
    lead = next((data for _, data in opened if data.cache is not None), opened[0][1])
    together = [each for each in opened if _same_images(each[1], lead)]
    apart = [each for each in opened if not _same_images(each[1], lead)]
    _train(together, lead, device, contest)
    for trial, data in apart:  # labels alone, and a dataset whose order is not the cache's
        _train([(trial, data)], data, device, contest)


def opener() -> Opener:
    """Opens each split once; for the trials of a sweep."""
    kept: dict[str, ImageSet] = {}

    def images_of(dataset: DatasetRecipe, split: str | None) -> ImageSet:
        key = f"{dataset.model_dump_json()} {split}"
        if key not in kept:
            kept[key] = open_images(dataset, split)
        return kept[key]

    return images_of


def _train(opened: Sequence[_Opened], lead: TrainingData, device: torch.device, contest: Contest | None) -> None:
    """Train trials side by side; those for which the memory did not suffice then have it to themselves."""
    waiting = [opened]
    while waiting:
        group = waiting.pop(0)
        crowded = _train_side_by_side(group, lead, device, contest)
        if crowded:
            names = ", ".join(trial.name for trial, _ in crowded)
            warn(f"too little memory for {len(group)} trials side by side, later and fewer at a time: {names}")
            release_memory(device)
            half = len(crowded) if len(crowded) < len(group) else (len(crowded) + 1) // 2
            waiting += [part for part in (crowded[:half], crowded[half:]) if part]


def _train_side_by_side(
    opened: Sequence[_Opened], lead: TrainingData, device: torch.device, contest: Contest | None
) -> list[_Opened]:
    """Train trials on one stream; gives those of several that lacked memory, other failures are in their folders."""
    first = opened[0][0].recipe
    targets = _targets_for_all(opened, lead, device)
    ended: list[tuple[_Opened, Exception]] = []
    with ExitStack() as stack:
        stack.enter_context(repeatable(device, first.deterministic))
        feed = open_feed(
            lead.images,
            lead.views,
            lead.num_views,
            targets,
            batch_size=first.batch_size,
            epochs=first.epochs,
            seed=first.seed,
            device=device,
            known=lead.known,
        )
        stack.callback(feed.close)
        runs: list[tuple[_Opened, Run]] = []
        for trial, data in opened:
            path, digest = stack.enter_context(claimed_run(data, trial.recipe))
            if settled(path):
                continue
            try:
                with explain_out_of_memory(trial.recipe, device):
                    run = Run(data, trial.recipe, device, path, digest, feed.steps_per_epoch)
                runs.append(((trial, data), run))
            except Exception as error:  # no such student, no memory
                ended.append(((trial, data), drop_tracebacks(error)))
        outcomes = _outcomes([run for _, run in runs], feed, contest)
    ended += [
        (one, outcome) for (one, _), outcome in zip(runs, outcomes, strict=True) if isinstance(outcome, Exception)
    ]
    crowded = []
    for one, reason in ended:
        if len(opened) > 1 and isinstance(reason, OutOfMemoryError):
            crowded.append(one)
        else:
            _fail(one[0].folder, reason)
    return crowded


def _outcomes(runs: Sequence[Run], feed: Feed, contest: Contest | None) -> list[RunResult | Exception | None]:
    if not runs:
        return []
    names = ", ".join(dict.fromkeys(run.recipe.student for run in runs))
    title = f"{len(runs)} trials, seed {runs[0].recipe.seed}: {names}"[:72]
    return train_group(runs, feed, title, **({} if contest is None else {"referee": contest.stop}))


def _targets_for_all(opened: Sequence[tuple[Trial, TrainingData]], lead: TrainingData, device: torch.device) -> Any:
    """The lead's targets with whatever any of the trials takes of them."""
    if lead.cache is None:
        return lead.targets
    taking = [(trial, data) for trial, data in opened if data.cache is not None]
    sparse = [data.targets.sparse_at for _, data in taking if isinstance(data.targets, CachedTargets)]
    return CachedTargets(
        lead.cache,
        device,
        logits=any(trial.recipe.loss.needs_logits for trial, _ in taking),
        features=any(trial.recipe.loss.needs_features and data.components is None for trial, data in taking),
        components=any(data.components is not None for _, data in taking),
        fusion=taking[0][0].recipe.fusion.resolve(lead.cache),
        sparse_at=next((temperature for temperature in sparse if temperature is not None), None),
    )


def _same_images(data: TrainingData, lead: TrainingData) -> bool:
    return data.images.content_digest == lead.images.content_digest and len(data.images) == len(lead.images)


def _fail(path: Path, error: Exception) -> None:
    text = str(error).strip().splitlines()[0] if str(error).strip() else "no details"
    message = str(error) if isinstance(error, CacheError) else f"{type(error).__name__}: {text[:300]}"
    Failure(kind=_KINDS.get(type(error), "error"), message=message).save(path)


def batch_streams(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials that can be trained side by side, in order of their first one.

    They have images and views, the order of both, the batch size, the number of epochs and the device in common, and
    one fusion of one cache. Trials on labels alone join those of a cache with the same dataset and views.
    """
    manifests: dict[str, Manifest] = {}
    streams: dict[str, list[Trial]] = {}
    for trial in trials:
        streams.setdefault(_stream(trial, manifests), []).append(trial)
    return [group for stream in streams.values() for group in _by_targets(stream)]


def _stream(trial: Trial, manifests: dict[str, Manifest]) -> str:
    """What trials of one stream have in common, as text."""
    recipe = trial.recipe
    if recipe.loss.needs_targets:
        assert recipe.cache is not None, "a recipe with targets has a cache"
        if recipe.cache not in manifests:
            manifests[recipe.cache] = TeacherCache.open(recipe.cache).manifest
        manifest = manifests[recipe.cache]
        located = {"data_dir": recipe.data_dir or manifest.dataset.data_dir, "download": recipe.download}
        dataset: DatasetRecipe | None = manifest.dataset.model_copy(update=located).absolute()
        views: ViewRecipe = manifest.recipe.views
        num_views: int | None = recipe.num_views or manifest.num_views
    else:
        dataset, views, num_views = recipe.dataset, recipe.views, recipe.num_views
    shared = (
        recipe.epochs,
        recipe.batch_size,
        recipe.seed,
        recipe.device,
        recipe.deterministic,
        (recipe.label_fraction, recipe.label_seed, recipe.label_fraction < 1.0 and recipe.loss.needs_targets),
        None if dataset is None else dataset.model_dump(mode="json"),
        views.model_dump(mode="json"),
        num_views,
    )
    return json.dumps(shared, sort_keys=True)


def _by_targets(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials of one stream, those of another cache or fusion apart; who needs no targets joins the first."""
    groups: dict[str, list[Trial]] = {}
    free = [trial for trial in trials if not trial.recipe.loss.needs_targets]
    for trial in trials:
        if trial.recipe.loss.needs_targets:
            key = f"{trial.recipe.cache} {trial.recipe.fusion.model_dump_json()}"
            groups.setdefault(key, []).append(trial)
    found = list(groups.values())
    if not found:
        return [free]
    return [sorted([*found[0], *free], key=lambda trial: trial.number), *found[1:]]
