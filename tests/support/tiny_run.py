"""Small pictures whose class can be learned, a cache of them with random targets, and recipes that train quickly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

from cache_tools.images import open_images
from cache_tools.images.recipe import DatasetRecipe
from tests.support import cache_factory
from train.checkpoints import BEST, EMA, LAST
from train.recipe import TrainRecipe

CLASSES = ("blue", "green", "red")
SIDE = 16
TIMINGS = ("train_s", "images_per_s")  # columns of the metrics that differ between equal runs


def write_pictures(root: Path, *, train: int = 50, test: int = 21, seed: int = 0) -> Path:
    """Write `train/CLASS/*.png` and `test/CLASS/*.png`: noise with a tint that depends on the class."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            label = number % len(CLASSES)
            pixels = rng.integers(0, 160, (SIDE, SIDE, 3))
            pixels[..., 2 - label] += 60
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03}.png")
    return root


def write_test_splits(root: Path, *, test: int) -> tuple[Path, list[str]]:
    """Write pictures, and give three test splits: `test`, a part of it, and a folder somewhere else."""
    pictures = write_pictures(root / "pictures", train=24, test=test)
    elsewhere = write_pictures(pictures / "elsewhere", train=3, test=12, seed=4)
    return pictures, ["test", "test[::2]", str(elsewhere / "test")]


def dataset(pictures: Path) -> DatasetRecipe:
    return DatasetRecipe(name="folder", data_dir=pictures, image_size=SIDE)


def write_cache(
    path: Path,
    pictures: Path,
    *,
    blocks: int | None = None,
    drifted: bool = False,
    download: bool = False,
    split: str = "train",
    **manifest: Any,
) -> Path:
    """A complete cache, or its first blocks only.

    Args:
        drifted: store canaries of other pixels.
        download: of the dataset in the manifest.
        split: the pictures to cache.
    """
    images: Any = open_images(dataset(pictures), split)
    source = dataset(pictures).model_copy(update={"download": download, "split": split})
    built = cache_factory.tiny_manifest(images, **manifest).model_copy(update={"dataset": source})
    if drifted:
        wrong = tuple(canary.model_copy(update={"pixel_digest": "0" * 32}) for canary in built.canaries)
        built = built.model_copy(update={"canaries": wrong})
    writer = cache_factory.create(path, built, images)
    missing = writer.missing_blocks()
    cache_factory.write(writer, cache_factory.tiny_targets(built), missing if blocks is None else missing[:blocks])
    return path


def recipe(cache: Path | str, out: Path, **changes: Any) -> TrainRecipe:
    """Three epochs of resnet8 in batches of 16, on the CPU."""
    data: dict[str, Any] = {
        "name": "tiny",
        "cache": str(cache),
        "student": "resnet8",
        "optimiser": {"learning_rate": 0.05},
        "epochs": 3,
        "batch_size": 16,
        "device": "cpu",
        "out": out,
    }
    return TrainRecipe.model_validate(data | changes)


def same_runs(one: Path, other: Path) -> None:
    """Check that two runs have byte-identical students and the same metrics, except for timings."""
    for name in (LAST, BEST, EMA):
        assert (one / name).exists() == (other / name).exists()
        if (one / name).exists():
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    tables = [pl.read_parquet(folder / "metrics.parquet").drop(TIMINGS) for folder in (one, other)]
    assert tables[0].equals(tables[1])
