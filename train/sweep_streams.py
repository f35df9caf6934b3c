"""Trials of a sweep that share a stream of batches: which they are."""

from __future__ import annotations

import json
from collections.abc import Sequence

from cache_tools.dataset import DatasetRecipe
from cache_tools.manifest import Manifest
from cache_tools.reader import TeacherCache
from cache_tools.views import ViewRecipe
from train.sweep_recipe import Trial


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
