"""Where images come from, as a user asks for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from cache_tools.config import Frozen

IMAGES_VERSION = 1  # raise when the canvas of some image file changes; see pipeline/build/known.py

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]

# Mean and std per RGB channel on [0, 1], over the train split. Digits, Fashion-MNIST: over the 32 × 32 canvas,
# as the tests recompute. CIFAR: the figures everybody uses. Folders: ImageNet's.
_NORMALISATION: dict[str, Normalisation] = {
    "digits": ((0.3058,) * 3, (0.3241,) * 3),
    "fashion-mnist": ((0.2190,) * 3, (0.3318,) * 3),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class DatasetRecipe(Frozen):
    """Where images come from.

    Attributes:
        name: the source; `folder` is any folder of class sub-folders.
        split: what is cached and trained on; `train[:20000]`, `train[50%:]` and `train[::5]` are parts of it (Python's
            slices, of samples in their order: take every k-th of a folder, whose classes come one after the other).
        test_split: what is evaluated on, None for nothing; parts as in `split`.
        data_dir: where the files are (`~` allowed); None for the source's usual place. Not needed for digits.
        download: fetch what is missing (Fashion-MNIST, CIFAR).
        image_size: side of the square canvas of a folder, 224 when None; the other sources have their own.
    """

    name: Literal["digits", "fashion-mnist", "cifar10", "cifar100", "folder"]
    split: str = "train"
    test_split: str | None = "test"
    data_dir: Path | None = None
    download: bool = False
    image_size: int | None = Field(None, ge=8, le=4096)

    @model_validator(mode="after")
    def _only_folders_choose_a_size(self) -> DatasetRecipe:
        if self.name != "folder" and self.image_size is not None:
            raise ValueError(f"image_size is for folders only; {self.name} has its own size, 32")
        if self.name == "folder" and self.data_dir is None:
            raise ValueError("a folder needs data_dir")
        return self

    @property
    def normalisation(self) -> Normalisation:
        """(mean, std), each per RGB channel, for pixels scaled to [0, 1]."""
        return _NORMALISATION[self.name]

    def absolute(self) -> DatasetRecipe:
        """The same recipe with an absolute data_dir, to be opened from any working directory."""
        if self.data_dir is None:
            return self
        return self.model_copy(update={"data_dir": Path(os.path.abspath(self.data_dir.expanduser()))})


def default_data_dir() -> Path:
    """Where array sources are looked for, and downloaded to, without a data_dir."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "teacher-cache" / "datasets"


class DatasetIdentity(Frozen):
    """Which samples, in which order, with which labels. `content_digest` covers keys, labels and class names."""

    name: str
    split: str
    num_samples: PositiveInt
    image_size: tuple[PositiveInt, PositiveInt]
    class_names: tuple[str, ...]
    content_digest: str
