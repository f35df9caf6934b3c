"""The speed-up of a cache: an epoch with live teachers over an epoch from the cache, and its share of the ideal.

Both epochs run through the same loop with the same loss on the same views. The ideal is the speed-up if everything but
the networks were free: (teacher + CLIP + student) / student, from bare forward passes of teacher and CLIP and bare
student steps on labels, on the same batches, timed in the same rounds.

    python benchmarks/online_vs_cached.py
    python benchmarks/online_vs_cached.py --dataset cifar100 --student resnet8x4 --device cuda
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import typer
from side_by_side import (
    BatchSize,
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
from students import Epochs, build, cached_fusion, new_student, opened, train_recipe

from cache_tools.console import command
from cache_tools.preprocess import prepare
from pipeline.networks.ensemble import TeacherEnsemble, load_ensemble
from pipeline.online import LiveTeachers
from pipeline.recipe import BuildRecipe
from train.data import TrainingData
from train.feed import Batch, CachedTargets
from train.loop import repeatable
from train.optim import create_optimiser
from train.recipe import TrainRecipe

CLOCK = (
    "online and cached: whole epochs, with making the view and reading targets or running the teachers; "
    "teachers: one forward pass of each, from uint8 pixels, per batch; "
    "student: forward, cross-entropy, backward, update per batch; both of these on batches in memory"
)


@command
def main(
    dataset: Dataset = "digits",
    student: Student = "resnet8",
    batch_size: BatchSize = 64,
    views: Views = 4,
    rounds: Rounds = 7,
    device_name: Device = "auto",
    threads: Threads = None,
    overrides: Overrides = None,
) -> None:
    """Speed-up of a cache over live teachers, and its share of the ideal."""
    device = prepared_device(device_name, threads)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        built = build(dataset, overrides, views, device, cache)
        recipe = train_recipe(cache, student, batch_size, rounds, device)
        data = opened(recipe, device)
        assert data.cache is not None
        ensemble = _ensemble(built, data, device)
        kept = CachedTargets(data.cache, device, logits=True, features=False)
        online = Epochs(data, recipe, LiveTeachers(ensemble), recipe.loss, device)
        cached = Epochs(data, recipe, kept, recipe.loss, device)
        batches = list(cached.feed.epoch(0))
        bare = BareStudent(data, recipe, device)
        with repeatable(device, deterministic=False):
            costs = interleaved(
                {
                    "online": online.cost,
                    "cached": cached.cost,
                    "teachers": lambda number: cost(lambda: _forward(ensemble, batches), device),
                    "student": lambda number: cost(lambda: bare.epoch(batches), device),
                },
                rounds,
            )
        online.close()
        cached.close()
    settings = {
        "dataset": dataset,
        "teacher": " + ".join(spec.name for spec in built.teachers),
        "clip": " + ".join(spec.name for spec in built.clips),
        "student": student,
        "n": cached.feed.samples_per_epoch,
        "batch_size": batch_size,
        "views": views,
    }
    report("online_vs_cached", _figures, costs, settings, CLOCK, device)


def _figures(times: Times) -> dict[str, dict[str, float]]:
    networks = np.add(times["teachers"], times["student"])
    speed_up, ideal = np.divide(times["online"], times["cached"]), networks / times["student"]
    return {
        "speed_up": ratios(times["online"], times["cached"]),
        "ideal": ratios(networks.tolist(), times["student"]),
        "achieved": ratios(speed_up.tolist(), ideal.tolist()),
    }


class BareStudent:
    """A student's steps on labels alone, without feed, schedule or metrics."""

    def __init__(self, data: TrainingData, recipe: TrainRecipe, device: torch.device) -> None:
        self._student = new_student(data, recipe).to(device).to(memory_format=torch.channels_last).train()
        self._optimiser = create_optimiser(recipe.optimiser, self._student.parameters())
        self._preprocessing = data.preprocessing

    def epoch(self, batches: list[Batch]) -> None:
        """One update per batch."""
        for batch in batches:
            pixels = batch.pixels.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(self._student(prepare(pixels, self._preprocessing)), batch.labels)
            self._optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self._optimiser.step()


def _forward(ensemble: TeacherEnsemble, batches: list[Batch]) -> None:
    for batch in batches:
        ensemble.outputs(batch.pixels)


def _ensemble(built: BuildRecipe, data: TrainingData, device: torch.device) -> TeacherEnsemble:
    return load_ensemble(
        built.teachers,
        built.clips,
        built.fusion,
        data.images,
        data.dataset,
        device,
        built.precision,
        fusion=cached_fusion(data),
    )


if __name__ == "__main__":
    typer.run(main)
