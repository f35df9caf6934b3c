"""The loops of examples/loops with `CachedDataset` beside that of train-student: epochs on the same cache.

Student, initial weights, batches, views and the form of the loss (CE and KD) are the same. The loops are those of the
examples, imported: the plain one as it is, and timm's with SGD, which the others have too.

    python benchmarks/own_loops.py
    python benchmarks/own_loops.py --student resnet8x4 --batch-size 128 --device cuda
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from side_by_side import (
    BatchSize,
    Cost,
    Dataset,
    Device,
    Overrides,
    Rounds,
    Student,
    Threads,
    Times,
    Views,
    cost,
    interleaved,
    prepared_device,
    ratios,
    report,
)
from students import Epochs, build, new_student, opened, train_recipe
from timm.scheduler import create_scheduler_v2

from cache_tools.console import command
from teacher_cache import CachedDataset
from train.data import TrainingData
from train.feed import CachedTargets
from train.loop import repeatable
from train.recipe import TrainRecipe
from train.recipe.loss import LossRecipe

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "loops"))
import plain
import timm_task

CLOCK = (
    "whole epochs: reading the next view from the cache, making its pixels, every batch and update; "
    "not opening the images, building the student or evaluating"
)


@command
def main(
    dataset: Dataset = "digits",
    student: Student = "resnet8",
    batch_size: BatchSize = 64,
    views: Views = 4,
    rounds: Rounds = 15,
    device_name: Device = "auto",
    threads: Threads = None,
    overrides: Overrides = None,
) -> None:
    """Epochs of loops of one's own against epochs of train-student."""
    device = prepared_device(device_name, threads)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        build(dataset, overrides, views, device, cache)
        recipe = train_recipe(cache, student, batch_size, rounds, device)
        data = opened(recipe, device)
        assert data.cache is not None
        targets = CachedTargets(data.cache, device, logits=True, features=False)
        loss = LossRecipe(kind="kd", distill_weight=0.9, temperature=4.0)
        epochs = Epochs(data, recipe, targets, loss, device)
        variants = {
            "train_student": epochs.cost,
            "plain_loop": _plain(data, recipe, device, rounds),
            "timm_loop": _timm(data, recipe, device, rounds),
        }
        with repeatable(device, deterministic=False):
            costs = interleaved(variants, rounds)
        epochs.close()
    settings = {
        "dataset": dataset,
        "student": student,
        "n": epochs.feed.samples_per_epoch,
        "batch_size": batch_size,
        "views": views,
    }
    report("own_loops", _figures, costs, settings, CLOCK, device)


def _figures(times: Times) -> dict[str, dict[str, float]]:
    """Throughput of each loop over that of train-student."""
    return {name: ratios(times["train_student"], times[name]) for name in ("plain_loop", "timm_loop")}


def _plain(data: TrainingData, recipe: TrainRecipe, device: torch.device, rounds: int) -> Callable[[int], Cost]:
    model, loader, optimiser = _parts(data, recipe, device)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, (rounds + 2) * len(loader))
    return lambda epoch: cost(lambda: plain.train_epoch(model, loader, optimiser, schedule, device), device)


def _timm(data: TrainingData, recipe: TrainRecipe, device: torch.device, rounds: int) -> Callable[[int], Cost]:
    model, loader, optimiser = _parts(data, recipe, device)
    task = timm_task.CachedDistillationTask(model, device=device)
    scheduler, _ = create_scheduler_v2(
        optimiser, sched="cosine", num_epochs=rounds + 2, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    return lambda epoch: cost(lambda: timm_task.train_epoch(task, loader, optimiser, scheduler, epoch, device), device)


def _parts(data: TrainingData, recipe: TrainRecipe, device: torch.device) -> tuple[Any, Any, torch.optim.Optimizer]:
    """A student, the loader of a dataset of its own, and the optimiser of the plain loop."""
    model = new_student(data, recipe).to(device, memory_format=torch.channels_last).train()
    loader = CachedDataset(str(recipe.cache)).loader(recipe.batch_size, seed=recipe.seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    return model, loader, optimiser


if __name__ == "__main__":
    typer.run(main)
