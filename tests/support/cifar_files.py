"""CIFAR-100 in its published file layout with a few random images; torchvision's MD5 sums are patched to match."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

CLASSES = 100


def write_cifar100(root: Path, patch: pytest.MonkeyPatch, *, train: int = 32, test: int = 16) -> Path:
    """Write `root/cifar-100-python`; labels cycle through the first eight classes."""
    rng = np.random.default_rng(0)
    cls: Any = datasets.CIFAR100
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    for table, count in (("train_list", train), ("test_list", test)):
        name = getattr(cls, table)[0][0]
        content = {
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": [number % 8 for number in range(count)],
            "coarse_labels": [0] * count,
            "filenames": [f"{number}.png" for number in range(count)],
        }
        patch.setattr(cls, table, [[name, _write_pickle(folder / name, content)]])
    names = {cls.meta["key"]: [f"some_class_{number}" for number in range(CLASSES)]}
    md5 = _write_pickle(folder / cls.meta["filename"], names)
    patch.setattr(cls, "meta", {**cls.meta, "md5": md5})
    return root


def _write_pickle(path: Path, content: dict[str, Any]) -> str:
    path.write_bytes(pickle.dumps(content, protocol=2))
    return hashlib.md5(path.read_bytes()).hexdigest()
