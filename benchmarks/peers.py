"""An epoch of KD from a cache, against mdistiller's and torchdistill's loops with a live teacher, in one run.

    python benchmarks/peers.py --mdistiller ~/code/mdistiller --torchdistill ~/code/torchdistill

Each option is a clone of the published code, which runs as it is. Without one its figures are null. All train the same
student on the same images with batches of the same size. The two loops get inputs that are decoded, augmented and
normalised already, through a DataLoader in their process, so that their times are of their loops and the teacher alone;
ours makes the pixels of its view as well. `bare` is the student with CE in plain torch on tensors that are there.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from unittest import mock

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
    cost,
    interleaved,
    prepared_device,
    ratios,
    report,
)
from students import BareUpdates, Epochs, build, new_student, opened, train_recipe
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from cache_tools.console import command
from cache_tools.errors import RecipeError
from train.feed import CachedTargets
from train.loop import repeatable
from train.students import create_student

PEERS = ("mdistiller", "torchdistill")
CLOCK = (
    "whole epochs; ours: the next view, its pixels and targets, every update; theirs: loading, teacher, every update"
)
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
TEMPERATURE = 4.0
Clone = Annotated[Path | None, typer.Option(help="A clone of its repository.")]


@command
def main(
    mdistiller: Clone = None,
    torchdistill: Clone = None,
    dataset: Dataset = "digits",
    student: Student = "resnet8x4",
    teacher: Annotated[str, typer.Option("--teacher", help="The live teacher of the two loops.")] = "resnet32x4",
    batch_size: BatchSize = 64,
    rounds: Rounds = 9,
    device_name: Device = "auto",
    threads: Threads = None,
    overrides: Overrides = None,
) -> None:
    """The times of an epoch over that of bare updates of the student."""
    device = prepared_device(device_name, threads)
    clones = {"mdistiller": mdistiller, "torchdistill": torchdistill}
    given = {name: clone for name, clone in clones.items() if clone is not None}
    for name, clone in given.items():
        add_clone(name, clone)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        build(dataset, overrides, 2, device, cache)
        recipe = train_recipe(cache, student, batch_size, rounds, device)
        data = opened(recipe, device)
        assert data.cache is not None
        kept = CachedTargets(data.cache, device, logits=True, features=False)
        ours = Epochs(data, recipe, kept, recipe.loss, device)
        bare = BareUpdates(data, recipe, device)
        variants: dict[str, Callable[[int], Cost]] = {"bare": bare.cost, "ours": ours.cost}
        inputs = torch.cat([batch.contiguous() for batch, _ in bare.batches]).cpu()
        labels = torch.cat([each for _, each in bare.batches]).cpu()
        for name in given:
            networks = (create_student(teacher, len(data.images.class_names)), new_student(data, recipe))
            epoch = LOOPS[name](*networks, inputs, labels, batch_size, device, Path(folder))
            variants[name] = timed(epoch, device)
        with repeatable(device, deterministic=False):
            costs = interleaved(variants, rounds)
        ours.close()
    settings = {"student": student, "teacher": teacher, "batch_size": batch_size, "images": len(labels)}
    report("peers", figures, costs, settings, CLOCK, device)


def add_clone(name: str, clone: Path) -> None:
    """Make the package of a clone importable.

    Raises:
        RecipeError: there is no such package in the folder, or it needs another that is not installed.
    """
    if not (clone / name / "__init__.py").is_file():
        raise RecipeError(
            "not a clone of this project",
            where=f"--{name} {clone}",
            expected=f"a folder {name} with an __init__.py",
            next_step="clone its repository, and give the folder of the clone",
        )
    sys.path.insert(0, str(clone.absolute()))
    try:
        for module in MODULES[name]:
            importlib.import_module(module)
    except ImportError as error:
        raise RecipeError(
            "its code cannot be imported",
            where=f"--{name} {clone}",
            found=str(error),
            next_step="install what it needs, or leave the option out",
        ) from error


MODULES = {
    "mdistiller": ("mdistiller.engine.trainer", "mdistiller.distillers.KD"),
    "torchdistill": ("torchdistill.core.distillation", "torchdistill.losses.mid_level"),
}


def mdistiller_epoch(
    teacher: nn.Module,
    student: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    batch_size: int,
    device: torch.device,
    folder: Path,
) -> Callable[[], None]:
    """An epoch of `BaseTrainer.train_iter` with the distiller `KD`, without its progress bar and files."""
    trainer_module, kd = (importlib.import_module(name) for name in MODULES["mdistiller"])
    solver = SimpleNamespace(
        TYPE="SGD", LR=SGD["lr"], MOMENTUM=SGD["momentum"], WEIGHT_DECAY=SGD["weight_decay"], LR_DECAY_STAGES=[]
    )
    weights = SimpleNamespace(CE_WEIGHT=0.1, KD_WEIGHT=0.9)
    settings = SimpleNamespace(
        SOLVER=solver,
        LOG=SimpleNamespace(PREFIX=str(folder), WANDB=False),
        KD=SimpleNamespace(TEMPERATURE=TEMPERATURE, LOSS=weights),
    )
    distiller = nn.DataParallel(kd.KD(_WithFeatures(student), _WithFeatures(teacher), settings).to(device))
    rows = TensorDataset(inputs, labels, torch.arange(len(labels)))
    loader = DataLoader(rows, batch_size, shuffle=True)
    trainer = trainer_module.BaseTrainer("peers", distiller, loader, None, settings)
    meter = trainer_module.AverageMeter

    def epoch() -> None:
        meters = {name: meter() for name in ("training_time", "data_time", "losses", "top1", "top5")}
        distiller.train()
        with _without_cuda(device):
            for batch in loader:
                trainer.train_iter(batch, 1, meters)

    return epoch


def torchdistill_epoch(
    teacher: nn.Module,
    student: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    batch_size: int,
    device: torch.device,
    folder: Path,
) -> Callable[[], None]:
    """An epoch of a `DistillationBox` with `KDLoss`, by the calls of its example of image classification."""
    box_module = importlib.import_module(MODULES["torchdistill"][0])
    paths = {"student_module_path": ".", "teacher_module_path": "."}
    ends = {"student_module_io": "output", "teacher_module_io": "output"}
    term = {"key": "KDLoss", "kwargs": {**paths, **ends, "temperature": TEMPERATURE, "alpha": 0.1}}
    settings = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": batch_size},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": dict(SGD)},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": term, "weight": 1.0}}}},
    }
    rows = {"train": TensorDataset(inputs, labels)}
    box = box_module.DistillationBox(teacher.to(device), student.to(device), rows, settings, device, None, False, 1)

    def epoch() -> None:
        box.pre_epoch_process(epoch=0)
        for images, targets, more in box.train_data_loader:
            loss = box.forward_process(images.to(device), targets.to(device), more)
            box.post_forward_process(loss)
            loss.item()  # its example logs it

    return epoch


LOOPS: dict[str, Callable[..., Callable[[], None]]] = {
    "mdistiller": mdistiller_epoch,
    "torchdistill": torchdistill_epoch,
}


def timed(epoch: Callable[[], None], device: torch.device) -> Callable[[int], Cost]:
    def variant(number: int) -> Cost:
        return cost(epoch, device)

    return variant


def figures(times: Times) -> dict[str, Any]:
    """Each over the bare updates, and the two loops over ours; null for a loop that did not run."""
    over_bare = {f"{name}_over_bare": _over(times, name, "bare") for name in ("ours", *PEERS)}
    return {**over_bare, **{f"{name}_over_ours": _over(times, name, "ours") for name in PEERS}}


def _over(times: Times, name: str, base: str) -> dict[str, float] | None:
    return ratios(times[name], times[base]) if name in times else None


class _WithFeatures(nn.Module):
    """A network whose result has the form of mdistiller's: logits and features."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.network(images), {}


@contextmanager
def _without_cuda(device: torch.device) -> Iterator[None]:
    """On the CPU, `Tensor.cuda` leaves a tensor where it is: mdistiller's loop calls it for every batch."""
    if device.type == "cuda":
        yield
        return
    with mock.patch.object(Tensor, "cuda", lambda tensor, *args, **settings: tensor):
        yield


if __name__ == "__main__":
    typer.run(main)
