"""Pictures and recipes for tests of image folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cache_tools.images.recipe import DatasetRecipe


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, so that wrong resampling or rotation shows."""
    generator = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, width)[None, :, None] * [1.0, 0.5, 0.2] + np.linspace(0, 100, height)[:, None, None]
    noisy = ramp + generator.normal(0, 12, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def photographs(height: int, width: int) -> torch.Tensor:
    """Two photographs of scikit-learn, every fifth pixel of a part: uint8 [2, 3, height, width]."""
    from sklearn.datasets import load_sample_images

    parts = [image[40 : 40 + 5 * height : 5, 100 : 100 + 5 * width : 5] for image in load_sample_images().images]
    return torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2).contiguous()


def recipe_for(root: Path, **fields: object) -> DatasetRecipe:
    """The recipe of a folder, on a canvas of 32 × 32."""
    return DatasetRecipe.model_validate({"name": "folder", "data_dir": root, "image_size": 32, **fields})
