"""An epoch of a student whose pixels come from a pixel file, against the student's bare steps.

The pictures are JPEGs of mixed sizes around 490 × 340, made from scikit-image's photos. All variants train the same
student from the same weights on the same batches, with the loop of `train-student`:

- `bare`: the batches are in memory already, so the epoch is the student's steps and nothing else;
- `packed`: the pictures are read from a pixel file, then cropped, flipped and put into batches;
- `decoded`: the same from the JPEGs.

Views crop the original pictures; `--canvases` measures views of a canvas of the same size, where only reading is left.
Like long runs, these use processes for decoding and cropping.

    python benchmarks/packed_pixels.py
    python benchmarks/packed_pixels.py --student resnet8x4 --size 64 --pictures 1000 --canvases
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from side_by_side import (
    BatchSize,
    Cost,
    Device,
    Rounds,
    Student,
    Threads,
    Times,
    cost,
    interleaved,
    prepared_device,
    processor_s,
    ratios,
    report,
)
from students import Epochs

from cache_tools.console import command
from cache_tools.decoding.service import FROM_PICTURES
from train.data import open_data
from train.feed import Batch, Feed, NoTargets
from train.loop import repeatable, train_epoch
from train.recipe import TrainRecipe
from train.recipe.loss import LossRecipe
from train.recipe.pixels import PixelRecipe

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "immunohistochemistry", "hubble_deep_field", "retina")
QUALITY = 90
CLOCK = (
    "whole epochs: reading or decoding, cropping, every batch and update; bare: every update on batches in memory. "
    "Not opening the images, making the file or evaluating. Processor time is that of all these processes"
)


@command
def main(
    student: Student = "timm:resnet18",
    pictures: Annotated[int, typer.Option("--pictures", min=2, help="Number of JPEGs.")] = 192,
    size: Annotated[int, typer.Option("--size", min=8, help="Side of the views.")] = 224,
    batch_size: BatchSize = 32,
    canvases: Annotated[bool, typer.Option("--canvases", help="Views of canvases, version 1.")] = False,
    rounds: Rounds = 7,
    device_name: Device = "auto",
    threads: Threads = None,
) -> None:
    """The speed of training from a pixel file and from JPEGs, over that of the bare student."""
    device = prepared_device(device_name, threads)
    crop = ["pad-crop", "flip"] if canvases else [{"op": "random-resized-crop", "size": size}, "flip"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TEACHER_CACHE_HOME"] = f"{folder}/home"
        _write_pictures(Path(folder), pictures)
        recipe = TrainRecipe.model_validate(
            {
                "name": "benchmark",
                "student": student,
                "dataset": {"name": "folder", "data_dir": folder, "image_size": size, "test_split": None},
                "views": {"version": 1 if canvases else 2, "ops": crop},
                "loss": {"kind": "ce"},
                "batch_size": batch_size,
                "epochs": max(rounds + 2, FROM_PICTURES // pictures + 1),
                "device": device_name,
            }
        )
        data = open_data(recipe, device)
        loss, variants = LossRecipe(kind="ce"), {}
        for name, disk in (("packed", 1 << 40), ("decoded", 0)):
            tier = PixelRecipe(device_memory=0, host_memory=0, disk=disk)
            variants[name] = Epochs(data, recipe.model_copy(update={"pixels": tier}), NoTargets(), loss, device)
        bare = _Bare(variants["packed"].feed, Epochs(replace(data), recipe, NoTargets(), loss, device))
        with repeatable(device, deterministic=False):
            costs = interleaved(
                {
                    "bare": bare.cost,
                    **{name: (lambda number, epochs=each: _epoch(epochs, number)) for name, each in variants.items()},
                },
                rounds,
            )
        served = {name: epochs.feed.served for name, epochs in variants.items()}
        for epochs in (*variants.values(), bare.epochs):
            epochs.close()
    assert "from" in str(served["packed"]), served
    settings = {
        "student": student,
        "n": pictures,
        "size": size,
        "batch_size": batch_size,
        "views": "canvases" if canvases else "crops of the original pictures",
    }
    report("packed_pixels", _figures, costs, settings, CLOCK, device)


def _figures(times: Times) -> dict[str, dict[str, float]]:
    return {
        "throughput": ratios(times["bare"], times["packed"]),
        "decoded": ratios(times["bare"], times["decoded"]),
        "gain": ratios(times["decoded"], times["packed"]),
    }


class _Bare:
    """A student's steps on the batches of a feed, which are all in memory before the clock starts."""

    def __init__(self, feed: Feed, epochs: Epochs) -> None:
        self._feed, self.epochs = feed, epochs

    def cost(self, number: int) -> Cost:
        memory: Any = _Memory(self._feed, number)
        return cost(
            lambda: train_epoch([self.epochs.learner], memory, number, lambda count: None),
            self._feed.device,
            processor_s,
        )


class _Memory:
    """The part of a feed that an epoch needs, with the batches of one epoch in memory."""

    def __init__(self, feed: Feed, number: int) -> None:
        self.device, self.steps_per_epoch = feed.device, feed.steps_per_epoch
        self._batches = list(feed.epoch(number))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        return iter(self._batches[first:])


def _epoch(epochs: Epochs, number: int) -> Cost:
    return cost(
        lambda: train_epoch([epochs.learner], epochs.feed, number, lambda count: None), epochs.feed.device, processor_s
    )


def _write_pictures(folder: Path, count: int) -> None:
    """Write `count` JPEGs, parts of the photos of random sizes; the class is the photo."""
    import skimage.data

    photos = [Image.fromarray(np.ascontiguousarray(getattr(skimage.data, name)()[..., :3])) for name in PHOTOS]
    generator = np.random.default_rng(0)
    for number in range(count):
        photo = photos[number % len(photos)]
        width = min(int(generator.integers(360, 620)), photo.width * 9 // 10)
        height = min(int(generator.integers(260, 420)), photo.height * 9 // 10)
        left = int(generator.integers(photo.width - width + 1))
        top = int(generator.integers(photo.height - height + 1))
        target = folder / "train" / PHOTOS[number % len(photos)] / f"{number:06}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        photo.crop((left, top, left + width, top + height)).save(target, quality=QUALITY)


if __name__ == "__main__":
    typer.run(main)
