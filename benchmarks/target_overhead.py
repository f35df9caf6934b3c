"""The overhead of cached targets: an epoch of distillation from a cache over an epoch on labels only.

Student, initial weights, loop, views and batches are the same in both. A third variant receives the targets and ignores
them, which separates reading and indexing them (`feed`) from the distillation loss itself (`loss`).

    python benchmarks/target_overhead.py
    python benchmarks/target_overhead.py --dataset fashion-mnist --rounds 7 --device cuda
"""

from __future__ import annotations

import tempfile
from pathlib import Path

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
    interleaved,
    prepared_device,
    ratios,
    report,
)
from students import Epochs, build, opened, train_recipe

from cache_tools.console import command
from train.feed import CachedTargets, NoTargets
from train.loop import repeatable
from train.recipe.loss import LossRecipe

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
    """An epoch with cached targets over an epoch on labels only."""
    device = prepared_device(device_name, threads)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        build(dataset, overrides, views, device, cache)
        recipe = train_recipe(cache, student, batch_size, rounds, device)
        data = opened(recipe, device)
        assert data.cache is not None
        labels = LossRecipe(kind="ce")
        kept = CachedTargets(data.cache, device, logits=True, features=False)
        variants = {
            "labels": Epochs(data, recipe, NoTargets(), labels, device),
            "fed": Epochs(data, recipe, kept, labels, device),
            "distilled": Epochs(data, recipe, kept, recipe.loss, device),
        }
        with repeatable(device, deterministic=False):
            costs = interleaved({name: epochs.cost for name, epochs in variants.items()}, rounds)
        for epochs in variants.values():
            epochs.close()
    settings = {
        "dataset": dataset,
        "student": student,
        "n": variants["labels"].feed.samples_per_epoch,
        "batch_size": batch_size,
        "views": views,
    }
    report("target_overhead", _figures, costs, settings, CLOCK, device)


def _figures(times: Times) -> dict[str, dict[str, float]]:
    return {
        "ratio": ratios(times["distilled"], times["labels"]),
        "feed": ratios(times["fed"], times["labels"]),
        "loss": ratios(times["distilled"], times["fed"]),
    }


if __name__ == "__main__":
    typer.run(main)
