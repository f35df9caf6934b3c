"""One run from recipe to result: open, check, claim its folder, train."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from cache_tools.config import dump_yaml
from cache_tools.console import resolve_device
from cache_tools.durable import put_durably
from cache_tools.errors import RecipeError
from cache_tools.memory import memory_told
from cache_tools.reader import TeacherCache
from train import folder, loggers
from train.data import TrainingData, open_data
from train.group import train_group
from train.loop import repeatable
from train.one_run import Run, command_line, draw
from train.recipe import TrainRecipe, recipe_digest, run_folder
from train.report import write_report
from train.result import RunResult, load_result


def train_student(recipe: TrainRecipe, *, overwrite: bool = False) -> RunResult:
    """Train a student, or go on with an interrupted run of the same recipe, or give the result of a finished one.

    With `compare_with_labels` the same student is then trained on labels alone, in `labels-only` inside the run folder.

    Args:
        overwrite: start over, whatever is in the run folder.

    Raises:
        CacheError: the subclass says what is wrong: recipe, device, cache, images, or storage.
    """
    device = run_device(recipe)
    loggers.chosen(recipe)  # a missing package is better known before the data are opened
    data = open_data(recipe, device)
    try:
        result = train_on(data, recipe, device, overwrite=overwrite)
    finally:
        data.targets.close()
    if recipe.compare_with_labels and recipe.loss.needs_targets and (result.labels_only is None or overwrite):
        assert data.num_views is not None, "targets come in views"
        twin = recipe.on_labels(data.dataset, data.views, data.num_views)
        twin = twin.model_copy(update={"out": result.folder / folder.LABELS_ONLY})
        baseline = train_on(data.labels_only(), twin, device, overwrite=overwrite)
        result = result.model_copy(update={"labels_only": baseline, "command": command_line()})
        draw(result)
        result.save()
    write_report([result.folder], result.folder / folder.REPORT)
    return result


def train_on(data: TrainingData, recipe: TrainRecipe, device: torch.device, *, overwrite: bool = False) -> RunResult:
    """`train_student` on data that are open already (from a cache, from live teachers), without the comparison."""
    with claimed_run(data, recipe, overwrite=overwrite) as (path, digest), repeatable(device, recipe.deterministic):
        if (finished := load_result(path)) is not None:
            return finished
        feed = data.feed(recipe, device)
        smaller = "train with a smaller --batch-size or student, or where there is more memory"
        with closing(feed), memory_told(f"{recipe.student} on {device}", smaller):
            run = Run(data, recipe, device, path, digest, feed.steps_per_epoch)
            [outcome] = train_group([run], feed, f"train {recipe.student} ({recipe.loss_name})")
            if isinstance(outcome, Exception):
                raise outcome
        assert outcome is not None, "a run without a referee goes to its end"
        return outcome


@contextmanager
def claimed_run(data: TrainingData, recipe: TrainRecipe, *, overwrite: bool = False) -> Iterator[tuple[Path, str]]:
    """Make or enter the folder of a run and keep others out of it; gives the folder and the digest of the run.

    Raises:
        RecipeError, StorageError: see `folder.claimed`.
    """
    identity = {"recipe": recipe.values(), "data": data.identity()}
    digest = recipe_digest(identity)
    path = run_folder(recipe, digest)
    with folder.claimed(path, identity, overwrite=overwrite):
        if load_result(path) is None:
            put_durably(path / folder.RECIPE, dump_yaml(recipe).encode())
            if data.cache is not None:
                put_durably(path / folder.CACHE, json.dumps(_where(data.cache), indent=2, ensure_ascii=False).encode())
        yield path, digest


def run_device(recipe: TrainRecipe) -> torch.device:
    """The device of a run.

    Raises:
        DeviceError, RecipeError: no such device, or one that cannot train in this precision.
    """
    device = resolve_device(recipe.device)
    if recipe.precision == "float16" and device.type != "cuda":
        raise RecipeError(
            "float16 training needs CUDA",
            where=f"--device {recipe.device}",
            next_step="use --precision bfloat16 or float32 on the CPU",
        )
    return device


def _where(cache: TeacherCache) -> dict[str, Any]:
    """Where a run's targets came from; `url` is that of a remote cache, whose mirror `path` then is."""
    url = None if cache.origin is None else cache.origin.url
    return {"path": str(cache.path.absolute()), "url": url, "manifest": cache.manifest.model_dump(mode="json")}
