"""Host time of a training step with next to no arithmetic: a tiny student, images of 8 × 8 pixels, batches of 2.

    python benchmarks/host_time.py

Times are of the processor, which other programs hardly affect. A GPU waits for the host where its own work takes
less. `bare` is the student's forward and backward pass with CE and SGD in plain torch.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from side_by_side import environment, prepared_device
from torch import nn

from cache_tools.console import command
from cache_tools.format.recipe import Preprocessing
from train.feed import Batch, BatchTargets
from train.loop import Learner, model_inputs, repeatable
from train.losses.contrastive import Components
from train.objective import Objective
from train.recipe import TrainRecipe
from train.recipe.loss import LOSSES

PREPROCESSING = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
SAMPLES, CLASSES, BATCH, SIDE = 64, 10, 2, 8
WIDTHS = (16, 24)


@command
def main(
    rounds: Annotated[int, typer.Option("--rounds", min=1)] = 9,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps in a round.")] = 60,
) -> None:
    """Milliseconds of a step: medians over rounds, every run in each round."""
    device = prepared_device("cpu", 1)
    runs = {"bare": _bare(), "kd": _step("kd"), "richkd": _step("richkd")}
    times: dict[str, list[float]] = {name: [] for name in runs}
    with repeatable(device, deterministic=False):
        for number in range(rounds + 1):
            for name in list(runs) if number % 2 else list(runs)[::-1]:
                start = time.process_time()
                for _ in range(steps):
                    runs[name]()
                if number:
                    times[name].append(1e3 * (time.process_time() - start) / steps)
    line: dict[str, Any] = {"benchmark": "host_time", "rounds": rounds, "steps": steps}
    line["ms"] = {name: _quartiles(values) for name, values in times.items()}
    line["more_than_bare_ms"] = {
        name: _quartiles([one - bare for one, bare in zip(times[name], times["bare"], strict=True)])
        for name in ("kd", "richkd")
    }
    print(json.dumps({**line, **environment(device)}))


class Tiny(nn.Module):
    """A student of 9 layers in timm's interface, of next to no arithmetic."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (3, 8, 8):
            layers += [nn.Conv2d(width, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(8, CLASSES)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = self.layers(images)
        return maps

    def forward_head(self, maps: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = maps.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


def _step(loss: str) -> Callable[[], None]:
    settings = {**LOSSES[loss], "crd_negatives": 8, "crd_dim": 8}
    recipe = TrainRecipe.model_validate({"name": "host", "cache": "none", "loss": settings, "batch_size": BATCH})
    torch.manual_seed(0)
    labels = np.arange(SAMPLES) % CLASSES
    network: Any = Tiny()
    components = Components(WIDTHS, (0.5, 0.5)) if recipe.loss.uses_components and loss == "richkd" else None
    objective = Objective(recipe.loss, network.num_features, 8, CLASSES, SAMPLES, labels, components=components)
    learner = Learner(recipe, network, objective, PREPROCESSING, SAMPLES // BATCH, torch.device("cpu"))
    learner.begin_epoch(0)
    batches = _batches(labels)

    def step() -> None:
        batch = next(batches)
        learner.step(batch, model_inputs(batch, PREPROCESSING))

    return step


def _batches(labels: np.ndarray) -> Iterator[Batch]:
    pixels = torch.randint(0, 256, (SAMPLES, 3, SIDE, SIDE), dtype=torch.uint8)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    numbers, logits = torch.from_numpy(labels), torch.randn(SAMPLES, CLASSES).half()
    features = [torch.randn(SAMPLES, width).half() for width in WIDTHS]
    while True:
        for start in range(0, SAMPLES, BATCH):
            rows = torch.arange(start, start + BATCH)
            targets = BatchTargets(
                logits.index_select(0, rows).float(),
                None,
                tuple(each.index_select(0, rows).float() for each in features),
            )
            yield Batch(pixels[start : start + BATCH], numbers[start : start + BATCH], rows, targets, start=start)


def _bare() -> Callable[[], None]:
    torch.manual_seed(0)
    network = Tiny().to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    inputs = torch.randn(BATCH, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(BATCH)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(network(inputs), labels).backward()
        optimiser.step()

    return step


def _quartiles(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(statistics.median(values), 4), "q1": round(low, 4), "q3": round(high, 4)}


if __name__ == "__main__":
    typer.run(main)
