"""Image sources: which samples, in which order, with which labels and pixels.

Every source gives RGB uint8 NCHW on one canvas size. Arrays (digits, Fashion-MNIST, CIFAR) live in
`image_arrays.py`, folders in `image_folder.py`. Nothing here imports torch, torchvision, scikit-learn or PIL.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cache_tools.config import Frozen
from cache_tools.errors import DataError

if TYPE_CHECKING:
    from cache_tools.format import DatasetIdentity

KEY_BYTES = 16
FOLDER_IMAGE_SIZE = 224

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]

# `train[:20000]`, `train[50%:]`, `train[::5]`
_END = r"(?:-?[0-9]+|[0-9]+(?:[.][0-9]+)?%)?"
_PART = re.compile(rf"(?P<split>[^\[\]]+)\[(?P<start>{_END}):(?P<stop>{_END})(?::(?P<step>[1-9][0-9]*)?)?\]")

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


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageSet(ABC):
    """One split of a source, opened.

    Attributes:
        class_names: as prompts use them, but with underscores kept; a label is an index into them.
        labels: int64 [N].
        keys: uint8 [N, 16], blake2b-128 of a sample's original bytes (its file for folders).
        image_size: (height, width) of the canvas.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    labels: np.ndarray
    keys: np.ndarray
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def resident(self) -> bool:
        """Whether all pixels are in memory already, so that `load` costs an indexing at most."""

    @abstractmethod
    def load(self, index: np.ndarray | slice) -> np.ndarray:
        """Pixels uint8 [B, 3, H, W] at `index`; a slice of a resident source is a view: do not write to it.

        Raises:
            DataError: an image that cannot be decoded, or that changed since the split was opened.
        """

    @cached_property
    def content_digest(self) -> str:
        """32 hex digits over keys, labels and class names: equal when samples, order and labels are."""
        names = json.dumps(self.class_names, ensure_ascii=True).encode()
        parts = (self.keys.tobytes(), self.labels.astype("<i8").tobytes(), names)
        return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()

    def subset(self, rows: slice | np.ndarray, split: str | None = None) -> Self:
        """The samples at `rows` (int indices or a slice), numbered anew from 0; `split` renames the split."""
        part = {"labels": self.labels[rows], "keys": self.keys[rows], **self._fields_at(rows)}
        return replace(self, split=split or self.split, **part)

    @abstractmethod
    def _fields_at(self, rows: slice | np.ndarray) -> dict[str, Any]:
        """What a source has per sample besides labels and keys, at `rows`."""

    def identity(self) -> DatasetIdentity:
        """What a cache records of this split, to recognise it later."""
        from cache_tools.format import DatasetIdentity

        return DatasetIdentity(
            name=self.name,
            split=self.split,
            num_samples=len(self),
            image_size=self.image_size,
            class_names=self.class_names,
            content_digest=self.content_digest,
        )


def open_images(recipe: DatasetRecipe, split: str | None = None) -> ImageSet:
    """Open a split or a part of one, `recipe.split` when None. Folders read every file (for the keys) but decode none.

    Raises:
        DataError: no such split, an empty part, missing or damaged files; says where it looked and what to do.
    """
    wanted = split or recipe.split
    whole = _PART.fullmatch(wanted)
    if whole is None:
        return _open_split(recipe, wanted)
    images = _open_split(recipe, whole["split"])
    start, stop = (_bound(whole[end], len(images)) for end in ("start", "stop"))
    part = images.subset(slice(start, stop, int(whole["step"]) if whole["step"] else None), wanted)
    if len(part) == 0:
        raise DataError("that part of the split is empty", where=wanted, found=f"{len(images)} samples in all")
    return part


def _open_split(recipe: DatasetRecipe, split: str) -> ImageSet:
    if recipe.name == "folder":
        from cache_tools.image_folder import open_folder

        return open_folder(recipe, split)
    from cache_tools.image_arrays import SOURCES

    return SOURCES[recipe.name](recipe, split)


def _bound(text: str, count: int) -> int | None:
    """One end of a slice over `count` samples: nothing, a number, or per cent of them."""
    if not text:
        return None
    return int(count * float(text[:-1]) / 100) if text.endswith("%") else int(text)


def sample_key(data: bytes | memoryview) -> bytes:
    """The 16-byte content key of one sample's original bytes."""
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()


def default_data_dir() -> Path:
    """Where array sources are looked for, and downloaded to, without a data_dir."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "teacher-cache" / "datasets"


def check_split(recipe: DatasetRecipe, split: str) -> bool:
    """True for `train`, False for `test`.

    Raises:
        DataError: anything else; the array sources have these two.
    """
    if split not in {"train", "test"}:
        raise DataError(
            f"{recipe.name} has no such split", where=split, expected="train or test, or a part such as train[:1000]"
        )
    return split == "train"
