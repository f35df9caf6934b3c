"""Caches and learners for the benchmarks of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from side_by_side import Cost, cost

from cache_tools.format.manifest import Fusion
from cache_tools.reader import TeacherCache
from pipeline.build.cache import build_cache
from pipeline.recipe import BuildRecipe, load_build_recipe
from train.data import TrainingData, open_data
from train.feed import Feed, NoTargets, TargetSource
from train.loop import Learner, model_inputs, train_epoch
from train.objective import Objective
from train.recipe import TrainRecipe
from train.recipe.loss import LossRecipe
from train.students import create_student


def build_recipe(dataset: str, overrides: list[str] | None, path: Path, **options: Any) -> BuildRecipe:
    """A build recipe for a fresh cache at `path`, without the preflight."""
    return load_build_recipe(dataset, overrides or (), {"out": path, "preflight_samples": 0, **options})


def build(dataset: str, overrides: list[str] | None, views: int, device: torch.device, path: Path) -> BuildRecipe:
    """Build a cache to train from, and return its recipe."""
    recipe = build_recipe(dataset, overrides, path, num_views=views, device=str(device))
    build_cache(recipe)
    return recipe


def train_recipe(cache: Path, student: str, batch_size: int, rounds: int, device: torch.device) -> TrainRecipe:
    """A distillation run from `cache`, with epochs for the warm-up, `rounds`, and one that the feed reads ahead."""
    data: dict[str, Any] = {"cache": str(cache), "student": student, "batch_size": batch_size, "epochs": rounds + 2}
    return TrainRecipe.model_validate({"name": "benchmark", "device": str(device), **data})


def opened(recipe: TrainRecipe, device: torch.device) -> TrainingData:
    """Open images, views and cached targets of a run, with the checks of `train-student`."""
    return open_data(recipe, device)


class Epochs:
    """A student with its own loop and feed, trained epoch by epoch under a clock.

    Args:
        targets: the source of the batches' targets.
        loss: the loss on them.
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
        """The cost of a whole epoch: reading and making its view, every batch and every step."""
        return cost(lambda: train_epoch([self.learner], self.feed, epoch, lambda count: None), self._device)

    def close(self) -> None:
        self.feed.close()


class BareUpdates:
    """Updates of a student alone, with CE in plain torch, on the batches of one epoch.

    Attributes:
        student, optimiser: what an update changes.
        batches: the inputs [B, 3, H, W], float32 in channels_last, and the labels of each batch.
    """

    def __init__(self, data: TrainingData, recipe: TrainRecipe, device: torch.device) -> None:
        self._device = device
        self.student = new_student(data, recipe).to(device).to(memory_format=torch.channels_last).train()
        self.optimiser = torch.optim.SGD(self.student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        epochs = Epochs(data, recipe, NoTargets(), recipe.loss.on_labels(), device)
        self.batches = [(model_inputs(batch, data.preprocessing), batch.labels) for batch in epochs.feed.epoch(0)]
        epochs.close()

    def cost(self, number: int) -> Cost:
        return cost(self._epoch, self._device)

    def _epoch(self) -> None:
        for inputs, labels in self.batches:
            self.optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(self.student(inputs), labels).backward()
            self.optimiser.step()


def new_student(data: TrainingData, recipe: TrainRecipe) -> Any:
    """The student of a recipe with initial weights from its seed."""
    torch.manual_seed(recipe.seed)
    return create_student(recipe.student, len(data.images.class_names))


def cached_fusion(data: TrainingData) -> Fusion:
    """The fusion that the cache was built with, so that live targets equal cached ones."""
    assert isinstance(data.cache, TeacherCache)
    return Fusion.stored(data.cache.manifest)
