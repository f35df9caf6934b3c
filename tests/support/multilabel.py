"""Small pictures with any number of coloured squares, and the table of their labels."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cache_tools.images.recipe import DatasetRecipe
from pipeline.recipe import BuildRecipe
from tests.support import tiny_build

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
CLASSES = tuple(COLOURS)
RATES = (0.5, 0.3, 0.4, 0.2)
SIDE = 16


def write_squares(root: Path, *, train: int = 64, test: int = 40, seed: int = 0) -> Path:
    """Write `train/*.png`, `test/*.png` and `labels.csv` with a column per class and a column `split`."""
    rng = np.random.default_rng(seed)
    rows = []
    for split, count in (("train", train), ("test", test)):
        (root / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 90, (SIDE, SIDE, 3)).astype(np.uint8)
            labels = rng.random(len(CLASSES)) < RATES
            for colour, has in zip(COLOURS.values(), labels, strict=True):
                if has:
                    top, left = rng.integers(0, SIDE - 5, 2)
                    pixels[top : top + 5, left : left + 5] = colour
            Image.fromarray(pixels).save(root / split / f"{number:03}.png")
            rows.append([f"{number:03}.png", split, *labels.astype(int).tolist()])
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "split", *CLASSES], *rows])
    return root


def dataset(root: Path) -> DatasetRecipe:
    return DatasetRecipe(name="folder", data_dir=root, image_size=SIDE, labels=Path("labels.csv"))


def build_recipe(root: Path, out: Path, **changes: Any) -> BuildRecipe:
    """Two views of the squares in `root/squares` with an untrained teacher, float32, without CLIP and preflight."""
    data: dict[str, Any] = {
        "name": "squares",
        "dataset": dataset(root / "squares").model_dump(),
        "views": {"base_seed": 11, "ops": ["pad-crop", "flip"]},
        "num_views": 2,
        "teacher": {"name": str(root / "teacher.safetensors")},
        "fusion": {"feature_dim": 16},
        "codec": "float32",
        "batch_size": 32,
        "block_rows": 32,
        "preflight_samples": 0,
        "device": "cpu",
        "out": out,
    }
    return BuildRecipe.model_validate(data | changes)


def prepare(root: Path) -> Path:
    """Write the files that `build_recipe(root, …)` needs."""
    write_squares(root / "squares")
    tiny_build.write_teacher(root / "teacher.safetensors", CLASSES)
    return root
