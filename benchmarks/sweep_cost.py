"""The cost of training several students on one stream of batches, over that of their arithmetic alone.

`ratio` is the time of an epoch of all students together, with views, pixels, targets and normalisation, over the sum
of their bare steps (forward, loss, backward, update) on batches in memory. `separate` is the same for separate epochs,
`gain` the throughput of the students together over that of one after the other.
With `--processes`, `commands` is the time of one `sweep-students` over that of one `train-student` per student in
sequence, start-up included.

    python benchmarks/sweep_cost.py --threads 1
    python benchmarks/sweep_cost.py --threads 1 --processes --rounds 3
    python benchmarks/sweep_cost.py --compile step --device cuda

With `--compile step` the updates of `together` and `separate` read buffers of a whole epoch, and on CUDA are graphs.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from side_by_side import (
    BatchSize,
    Cost,
    Dataset,
    Device,
    Overrides,
    Rounds,
    Threads,
    Times,
    Views,
    cost,
    interleaved,
    prepared_device,
    ratios,
    report,
)
from students import build, opened, train_recipe

from cache_tools.console import command
from train.data import TrainingData
from train.feed import Batch
from train.loop import Learner, model_inputs, repeatable, train_epoch
from train.objective import Objective
from train.recipe import TrainRecipe
from train.students import create_student

CLOCK = (
    "together, separate: whole epochs, from reading the next view to the last update; bare: updates on normalised "
    "batches in memory; sweep, runs: the commands from their start to their end"
)
STUDENTS = "resnet8,resnet14,resnet20,wrn_16_1,ShuffleV2,MobileNetV2,vgg8,resnet8x4"


@command
def main(
    dataset: Dataset = "digits",
    students: Annotated[str, typer.Option("--students", help="Separated by commas.")] = STUDENTS,
    batch_size: BatchSize = 64,
    views: Views = 4,
    rounds: Rounds = 7,
    processes: Annotated[bool, typer.Option("--processes", help="Also compare the commands.")] = False,
    compile_mode: Annotated[
        Literal["off", "step"], typer.Option("--compile", help="How the steps of cached students run.")
    ] = "off",
    device_name: Device = "auto",
    threads: Threads = None,
    overrides: Overrides = None,
) -> None:
    """Students trained together over their bare arithmetic."""
    device = prepared_device(device_name, threads)
    names = students.split(",")
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        build(dataset, overrides, views, device, cache)
        recipe = train_recipe(cache, names[0], batch_size, rounds, device)
        data = opened(recipe, device)
        feed = data.feed(recipe, device)
        cached = recipe.model_copy(update={"compile": compile_mode})
        learners = {
            variant: [_learner(data, how, name, feed.steps_per_epoch, device) for name in names]
            for variant, how in (("together", cached), ("separate", cached), ("bare", recipe))
        }
        feeds = [data.feed(recipe, device) for _ in names]
        kept: list[tuple[Batch, torch.Tensor]] = [(b, model_inputs(b, data.preprocessing)) for b in feed.epoch(0)]

        def together(epoch: int) -> None:
            for outcome in train_epoch(learners["together"], feed, epoch, lambda count: None):
                assert not isinstance(outcome, Exception), outcome

        def separate(epoch: int) -> None:
            for learner, own in zip(learners["separate"], feeds, strict=True):
                train_epoch([learner], own, epoch, lambda count: None)

        def bare(epoch: int) -> None:
            for learner in learners["bare"]:
                learner.begin_epoch(epoch)
                for batch, inputs in kept:
                    learner.step(batch, inputs)
                learner.end_epoch(epoch)

        variants = {
            work.__name__: lambda number, work=work: cost(lambda: work(number), device)
            for work in (together, separate, bare)
        }
        if processes:
            variants |= {
                "sweep": lambda number: _command(cache, names, Path(folder) / f"sweep-{number}", together=True),
                "runs": lambda number: _command(cache, names, Path(folder) / f"runs-{number}", together=False),
            }
        with repeatable(device, deterministic=False):
            costs = interleaved(variants, rounds)
        for each in (feed, *feeds):
            each.close()
    settings = {
        "dataset": dataset,
        "students": names,
        "n": feed.samples_per_epoch,
        "batch_size": batch_size,
        "views": views,
        "compile": compile_mode,
    }
    report("sweep_cost", _figures, costs, settings, CLOCK, device)


def _learner(data: TrainingData, recipe: TrainRecipe, student: str, steps: int, device: torch.device) -> Learner:
    torch.manual_seed(recipe.seed)
    network = create_student(student, len(data.images.class_names))
    classes = len(data.images.class_names)
    objective = Objective(recipe.loss, network.num_features, data.target_dim, classes, len(data.images), data.labels)  # type: ignore[arg-type]
    return Learner(recipe, network, objective, data.preprocessing, steps, device)


def _command(cache: Path, names: list[str], out: Path, *, together: bool) -> Cost:
    """The cost of two epochs of every student through the commands."""
    shared = ["digits", "--cache", str(cache), "--epochs", "2", "--set", "compare_with_labels=false", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    if together:
        commands = [["train.sweep.cli", *shared, "--students", ",".join(names), "--workers", "1", "--out", str(out)]]
    else:
        commands = [["train.cli", *shared, "--student", name, "--out", str(out / name)] for name in names]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for words in commands:
        subprocess.run(
            [sys.executable, "-m", *words],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(time.perf_counter() - start, processor_s)


def _figures(times: Times) -> dict[str, dict[str, float]]:
    figures = {
        "ratio": ratios(times["together"], times["bare"]),
        "separate": ratios(times["separate"], times["bare"]),
        "gain": ratios(times["separate"], times["together"]),
    }
    return figures | ({"commands": ratios(times["sweep"], times["runs"])} if "sweep" in times else {})


if __name__ == "__main__":
    typer.run(main)
