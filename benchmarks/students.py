"""A cache to train from and learners that train from it, for the benchmarks of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from side_by_side import Cost, cost

from cache_tools.format.manifest import Fusion
from cache_tools.reader import TeacherCache
from pipeline.build.cache import build_cache
from pipeline.recipe import BuildRecipe, load_build_recipe
from train.data import TrainingData, open_data
from train.feed import Feed, TargetSource
from train.loop import Learner, train_epoch
from train.objective import Objective
from train.recipe import LossRecipe, TrainRecipe
from train.students import create_student


def build_recipe(dataset: str, overrides: list[str] | None, path: Path, **options: Any) -> BuildRecipe:
    """A build recipe for a fresh cache at `path`, without the preflight."""
    return load_build_recipe(dataset, overrides or (), {"out": path, "preflight_samples": 0, **options})


def build(dataset: str, overrides: list[str] | None, views: int, device: torch.device, path: Path) -> BuildRecipe:
    """Build the cache that is trained from, and give the recipe of it."""
    recipe = build_recipe(dataset, overrides, path, num_views=views, device=str(device))
    build_cache(recipe)
    return recipe


def train_recipe(cache: Path, student: str, batch_size: int, rounds: int, device: torch.device) -> TrainRecipe:
    """A run of distillation from `cache`, long enough for a warm-up epoch, `rounds` more, and one to read ahead."""
    data: dict[str, Any] = {"cache": str(cache), "student": student, "batch_size": batch_size, "epochs": rounds + 2}
    return TrainRecipe.model_validate({"name": "benchmark", "device": str(device), **data})


def opened(recipe: TrainRecipe, device: torch.device) -> TrainingData:
    """Images, views and cached targets of a run, checked as `train-student` checks them."""
    return open_data(recipe, device)


class Epochs:
    """A student with its own loop and feed, trained epoch by epoch under a clock.

    Args:
        targets: where the batches get their targets.
        loss: what is made of them.
    """

    def __init__(
        self, data: TrainingData, recipe: TrainRecipe, targets: TargetSource, loss: LossRecipe, device: torch.device
    ) -> None:
        self._device = device
        self.feed: Feed = replace(data, targets=targets).feed(recipe, device)
        self.recipe = recipe.model_copy(update={"loss": loss})
        student = new_student(data, recipe)
        images = data.images
        num_classes = len(images.class_names)
        objective = Objective(
            loss, student.num_features, data.target_dim, num_classes, len(images), images.labels, seed=recipe.seed
        )
        self.learner = Learner(self.recipe, student, objective, data.preprocessing, self.feed.steps_per_epoch, device)

    def cost(self, epoch: int) -> Cost:
        """What a whole epoch takes: its view read and made, every batch, every step."""
        return cost(lambda: train_epoch([self.learner], self.feed, epoch, lambda count: None), self._device)

    def close(self) -> None:
        self.feed.close()


def new_student(data: TrainingData, recipe: TrainRecipe) -> Any:
    """The student of a recipe with its first weights, the same for the same seed."""
    torch.manual_seed(recipe.seed)
    return create_student(recipe.student, len(data.images.class_names))


def cached_fusion(data: TrainingData) -> Fusion:
    """How teachers and CLIPs were fused when the cache was built, so that live targets are the cached ones."""
    assert isinstance(data.cache, TeacherCache)
    return Fusion.stored(data.cache.manifest)
