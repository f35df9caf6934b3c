"""Perfect teachers without training: an untrained network whose classifier is fitted to a folder of plain pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cache_tools.images import open_images
from cache_tools.images.recipe import DatasetRecipe
from train.students import create_student

SIDE = 16


def write_pictures(root: Path, classes: Sequence[str], *, train: int = 6, test: int = 6) -> Path:
    """Write `train/CLASS/*.png` and `test/CLASS/*.png`: a pattern per class, by its place in `classes`, with noise."""
    for split, count in (("train", train), ("test", test)):
        for place, name in enumerate(classes):
            pattern = np.kron(np.random.default_rng(place).integers(40, 216, (4, 4, 3)), np.ones((4, 4, 1)))
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = np.random.default_rng([place, number, len(split)]).normal(0, 6, pattern.shape)
                Image.fromarray((pattern + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return root


def dataset(root: Path, **fields: Any) -> DatasetRecipe:
    return DatasetRecipe(name="folder", data_dir=root, image_size=SIDE, **fields)


def fitted_weights(root: Path, outputs: Sequence[str], architecture: str = "resnet8") -> dict[str, torch.Tensor]:
    """Weights of a network that is right for every picture of `root`, with output i for the class `outputs[i]`.

    Names that are no classes of the pictures get outputs of their own, which are never the largest.
    """
    images = open_images(dataset(root))
    torch.manual_seed(0)
    network: Any = create_student(architecture, len(outputs)).eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in dataset(root).normalisation)
    with torch.no_grad():
        pixels = (torch.from_numpy(images.load(slice(None))).float() / 255 - mean) / std
        features = network.forward_head(network.forward_features(pixels), pre_logits=True).double()
        # Centred and scaled, or the fit is ill-conditioned: features of an untrained network hardly differ.
        centre, scale = features.mean(0), features.std(0).clamp_min(1e-6)
        design = torch.cat([(features - centre) / scale, torch.ones(len(features), 1)], dim=1)
        wanted = torch.full((len(features), len(outputs)), -1.0, dtype=torch.float64)
        for row, label in enumerate(images.labels.tolist()):
            wanted[row, list(outputs).index(images.class_names[label])] = 10.0
        gram = design.T @ design + 1e-3 * torch.eye(design.shape[1], dtype=torch.float64)
        solution = torch.linalg.solve(gram, design.T @ wanted)
        head = network.get_classifier()
        head.weight.copy_((solution[:-1] / scale[:, None]).T)
        head.bias.copy_(solution[-1] - (centre / scale) @ solution[:-1])
        assert [outputs[i] for i in network(pixels).argmax(1)] == [images.class_names[i] for i in images.labels]
    return network.state_dict()
