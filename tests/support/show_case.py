"""A folder of pictures of seven classes, and caches of them whose targets lean towards the labels."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache_tools import plugins
from cache_tools.images import open_images
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.reader import TeacherCache
from tests.support.cache_factory import tiny_manifest, write_leaning

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
SIDE, SAMPLES, NUM_VIEWS = 16, 45, 4
ROOT = Path(__file__).parents[2]


def write_pictures(root: Path, *, names: tuple[str, ...] = CLASSES, side: int = SIDE) -> Path:
    """Write `train/CLASS/NUMBER.png` and `test/…`: noise. Of 45 pictures the first class has more than the others."""
    rng = np.random.default_rng(0)
    for split, count in (("train", SAMPLES), ("test", len(names))):
        for number in range(count):
            label = 0 if number % 4 == 3 and split == "train" else number % len(names)
            folder = root / split / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return root


def write_cache(path: Path, pictures: Path, *, side: int = SIDE, **recipe: Any) -> TeacherCache:
    """Targets in float32 that are right, wrong, confident and unsure."""
    source = DatasetRecipe(name="folder", data_dir=pictures, image_size=side)
    images: Any = open_images(source, "train")
    settings: dict[str, Any] = {
        "num_views": NUM_VIEWS,
        "linear_head": False,
        "codec": "float32",
        "clip_dim": 24,
    } | recipe
    manifest = tiny_manifest(images, **settings).model_copy(update={"dataset": source})
    return write_leaning(path, manifest, images)


def declare_plugins(patch: pytest.MonkeyPatch) -> None:
    """Find the plugins that pyproject.toml declares, also where an older version is installed."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][plugins.GROUP]
    points = EntryPoints(EntryPoint(name, value, plugins.GROUP) for name, value in declared.items())
    patch.setattr(plugins, "entry_points", lambda **wanted: points.select(**wanted))
