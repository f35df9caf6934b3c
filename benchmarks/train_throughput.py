"""Training from a cache with the whole update as a CUDA graph, over the bare student captured in the same way.

`step` are epochs of distillation with `--compile step`; `bare` is the same student with CE alone on inputs that are
already there: forward, loss, backward, SGD, on CUDA a graph for each size of batch. On the CPU neither is captured.
`--schedule N` also times a whole run of `train-student` of N epochs, with its checkpoints and evaluations.

    python benchmarks/train_throughput.py --precision bfloat16 --schedule 240 --device cuda
    python benchmarks/train_throughput.py --schedule 2 --device cpu
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
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
from students import BareUpdates, Epochs, build, opened, train_recipe

from cache_tools.console import command
from train.feed import CachedTargets
from train.loop import repeatable
from train.recipe import TrainRecipe
from train.run import train_student

CLOCK = (
    "step: whole epochs, from reading the next view to the last update, without the first, which captures; bare: the "
    "updates alone; schedule_s: wall clock of a run from opening the cache to its result"
)
WARM_UP = 3
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@command
def main(
    dataset: Dataset = "digits",
    student: Student = "resnet8x4",
    batch_size: BatchSize = 64,
    views: Views = 4,
    rounds: Rounds = 7,
    precision: Annotated[str, typer.Option("--precision", help="float32 or bfloat16, of both.")] = "float32",
    schedule: Annotated[int, typer.Option("--schedule", min=0, help="Epochs of a whole run; 0 for none.")] = 0,
    device_name: Device = "auto",
    threads: Threads = None,
    overrides: Overrides = None,
) -> None:
    """Throughput of training over that of the bare updates."""
    device = prepared_device(device_name, threads)
    if precision not in _PRECISIONS:
        raise typer.BadParameter(f"one of {', '.join(_PRECISIONS)}, not {precision}", param_hint="--precision")
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        build(dataset, overrides, views, device, cache)
        settings: dict[str, Any] = {"compile": "step", "precision": precision}
        recipe = train_recipe(cache, student, batch_size, rounds, device).model_copy(update=settings)
        data = opened(recipe, device)
        assert data.cache is not None
        kept = CachedTargets(data.cache, device, logits=True, features=False)
        ours = Epochs(data, recipe, kept, recipe.loss, device)
        bare = _Updates(BareUpdates(data, recipe, device), _PRECISIONS[precision], device)
        with repeatable(device, deterministic=False):
            costs = interleaved({"step": ours.cost, "bare": bare.cost}, rounds)
        ours.close()
        line: dict[str, Any] = {"schedule_epochs": schedule}
        if schedule:
            line["schedule_s"] = round(_schedule(recipe, schedule, Path(folder) / "run"), 2)
    report(
        "train_throughput",
        _figures,
        costs,
        {
            "dataset": dataset,
            "student": student,
            "n": ours.feed.samples_per_epoch,
            "batch_size": batch_size,
            "views": views,
            "precision": precision,
            "captured": device.type == "cuda",
            **line,
        },
        CLOCK,
        device,
    )


class _Updates:
    """The updates of `BareUpdates`, on CUDA as graphs that read their batch from a buffer."""

    def __init__(self, bare: BareUpdates, precision: torch.dtype, device: torch.device) -> None:
        self._bare, self._precision, self._device = bare, precision, device
        self._replays: dict[int, tuple[torch.Tensor, torch.Tensor, Callable[[], None]]] = {}

    def cost(self, number: int) -> Cost:
        """The cost of an epoch; the first one captures."""
        return cost(self._epoch, self._device)

    def _epoch(self) -> None:
        for inputs, labels in self._bare.batches:
            if len(labels) not in self._replays:
                self._replays[len(labels)] = self._replay_of(inputs.clone(), labels.clone())
            own_inputs, own_labels, replay = self._replays[len(labels)]
            own_inputs.copy_(inputs)
            own_labels.copy_(labels)
            replay()

    def _replay_of(
        self, inputs: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
        student, optimiser = self._bare.student, self._bare.optimiser

        def update() -> None:
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast(self._device.type, self._precision, enabled=self._precision is not torch.float32):
                logits = student(inputs)
            F.cross_entropy(logits.float(), labels).backward()
            optimiser.step()

        if self._device.type != "cuda":
            return inputs, labels, update
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                update()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            update()
        return inputs, labels, graph.replay


def _schedule(recipe: TrainRecipe, epochs: int, out: Path) -> float:
    """Seconds of a whole run."""
    update: dict[str, Any] = {"epochs": epochs, "out": out, "compare_with_labels": False}
    if recipe.device == "cpu":
        update["compile"] = "off"  # refused there: nothing can be captured
    start = time.perf_counter()
    train_student(recipe.model_copy(update=update))
    return time.perf_counter() - start


def _figures(times: Times) -> dict[str, dict[str, float]]:
    return {"throughput": ratios(times["bare"], times["step"])}


if __name__ == "__main__":
    typer.run(main)
