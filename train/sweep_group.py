"""Train the trials of a sweep that share a stream of batches; what one of them comes to is its own affair."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from cache_tools.console import warn
from cache_tools.dataset import DatasetRecipe
from cache_tools.errors import CacheError
from cache_tools.image_set import ImageSet
from cache_tools.images import open_images
from cache_tools.memory import free_memory, lacks_memory
from train.data import Opener, TrainingData, open_data
from train.feed import CachedTargets, Feed, open_feed
from train.group import train_group
from train.halving import Contest
from train.loop import repeatable
from train.one_run import Run
from train.outcome import Failure, settled
from train.result import RunResult
from train.run import claimed_run, run_device
from train.sweep_recipe import Trial

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
            free_memory(device)
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
                run = Run(data, trial.recipe, device, path, digest, feed.steps_per_epoch)
                runs.append(((trial, data), run))
            except Exception as error:  # no such student, no memory
                ended.append(((trial, data), error.with_traceback(None)))
        outcomes = _outcomes([run for _, run in runs], feed, contest)
    ended += [
        (one, outcome) for (one, _), outcome in zip(runs, outcomes, strict=True) if isinstance(outcome, Exception)
    ]
    crowded = []
    for one, reason in ended:
        if len(opened) > 1 and lacks_memory(reason):
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
    diverged = any(words in message for words in ("diverged", "logits are not finite"))
    kind = "diverged" if diverged else "memory" if lacks_memory(error) else "error"
    Failure(kind=kind, message=message).save(path)
