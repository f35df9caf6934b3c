"""A folder in the layout of CIFAR-10-C. Its pixels encode their file, severity and image."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from train.evaluate.corruptions import CORRUPTIONS, SEVERITIES


def write(folder: Path, labels: np.ndarray, side: int = 32) -> Path:
    """Red is the number of the corruption, green the severity, blue the image (below 256)."""
    folder.mkdir(parents=True, exist_ok=True)
    count = len(labels)
    for number, name in enumerate(CORRUPTIONS):
        pixels = np.zeros((len(SEVERITIES), count, side, side, 3), np.uint8)
        pixels[..., 0] = number
        pixels[..., 1] = np.array(SEVERITIES)[:, None, None, None]
        pixels[..., 2] = np.arange(count)[None, :, None, None]
        np.save(folder / f"{name}.npy", pixels.reshape(-1, side, side, 3))
    np.save(folder / "labels.npy", np.tile(labels, len(SEVERITIES)).astype(np.uint8))
    return folder
