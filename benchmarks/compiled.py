"""`--compile model` against the eager step, and the eager step against bare updates of the same student.

    python benchmarks/compiled.py --student resnet8x4
    python benchmarks/compiled.py --student MobileNetV2 --rounds 9

`compiled` and `eager` are epochs of distillation from a cache; `bare` is the same student with CE alone on tensors that
are already there: forward, loss, backward, SGD. The first compilation is not in the times; `compile_s` has it.
"""

from __future__ import annotations

import tempfile
import time
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
    interleaved,
    prepared_device,
    ratios,
    report,
)
from students import BareUpdates, Epochs, build, opened, train_recipe

from cache_tools.console import command
from train.feed import CachedTargets
from train.loop import repeatable

CLOCK = "whole epochs: the next view, its pixels, every batch and update; bare: the updates alone"


@command
def main(
    dataset: Dataset = "digits",
    student: Student = "resnet8x4",
    batch_size: BatchSize = 64,
    rounds: Rounds = 9,
    device_name: Device = "auto",
    threads: Threads = None,
    overrides: Overrides = None,
) -> None:
    """An epoch with a compiled step over one with an eager step, and over bare updates."""
    device = prepared_device(device_name, threads)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        build(dataset, overrides, 2, device, cache)
        recipe = train_recipe(cache, student, batch_size, rounds, device)
        data = opened(recipe, device)
        assert data.cache is not None
        kept = CachedTargets(data.cache, device, logits=True, features=False)
        runs = {
            mode: Epochs(data, recipe.model_copy(update={"compile": mode}), kept, recipe.loss, device)
            for mode in ("off", "model")
        }
        bare = BareUpdates(data, recipe, device)
        start = time.perf_counter()
        with repeatable(device, deterministic=False):
            runs["model"].cost(0)
            compile_s = time.perf_counter() - start
            variants = {"eager": runs["off"].cost, "compiled": runs["model"].cost, "bare": bare.cost}
            costs = interleaved(variants, rounds)
        for epochs in runs.values():
            epochs.close()
    settings = {"student": student, "batch_size": batch_size, "compile_s": round(compile_s, 1)}
    report("compiled", _figures, costs, settings, CLOCK, device)


def _figures(times: Times) -> dict[str, dict[str, float]]:
    return {
        "compiled_over_eager": ratios(times["compiled"], times["eager"]),
        "compiled_over_bare": ratios(times["compiled"], times["bare"]),
        "eager_over_bare": ratios(times["eager"], times["bare"]),
    }


if __name__ == "__main__":
    typer.run(main)
