"""An opened split of an image source: its samples in order, with their keys, labels and pixels."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np

from cache_tools.images.decode import Needs
from cache_tools.images.recipe import DatasetIdentity

KEY_BYTES = 16

Interpolation = Literal["nearest", "bilinear", "bicubic"]


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageSet(ABC):
    """An opened split of an image source.

    Attributes:
        class_names: as in prompts, but with underscores; a label is an index into them.
        labels: int64 [N]; for images with any number of labels uint8 [N, C], 1 where the image has the label.
        keys: uint8 [N, 16], blake2b-128 of a sample's original bytes (in a folder, of its file).
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
    def multi_label(self) -> bool:
        """Whether an image may have any number of labels."""
        return self.labels.ndim == 2

    @property
    @abstractmethod
    def resident(self) -> bool:
        """Whether all pixels are in memory, so that `load` only indexes them."""

    @abstractmethod
    def load(self, index: np.ndarray | slice) -> np.ndarray:
        """Pixels uint8 [B, 3, H, W] at `index`; a slice of a resident source is a view: do not write to it.

        Raises:
            DataError: an image cannot be decoded, or it changed since the split was opened.
        """

    def pictures(self, index: np.ndarray | slice) -> list[np.ndarray]:
        """The images as they were decoded, uint8 [3, H, W], each of its own size; here, that of the canvas.

        Raises:
            DataError: as `load`.
        """
        return list(self.load(index))

    def decoded_for(self, needed: Needs | None) -> Self:
        """The same images, whose `pictures` may be smaller where views need no more (`ViewRecipe.needed`)."""
        return self

    def at(self, side: int, interpolation: Interpolation = "bicubic") -> Self:
        """The same images on a square canvas of another side, made of their files; images of one size are unchanged."""
        return self

    @cached_property
    def content_digest(self) -> str:
        """32 hex digits over keys, labels and class names: equal if samples, order and labels are equal."""
        labels = np.ascontiguousarray(self.labels, dtype=None if self.multi_label else "<i8")
        digest = hashlib.blake2b(np.ascontiguousarray(self.keys).data, digest_size=16)
        digest.update(labels.data)
        digest.update(json.dumps(self.class_names, ensure_ascii=True).encode())
        return digest.hexdigest()

    def subset(self, rows: slice | np.ndarray, split: str | None = None) -> Self:
        """The samples at `rows` (int indices or a slice), renumbered from 0; `split` renames the split."""
        part = {"labels": self.labels[rows], "keys": self.keys[rows], **self._fields_at(rows)}
        return replace(self, split=split or self.split, **part)

    def notes(self) -> list[str]:
        """What a user should know of the split's files, one line each, such as files that are left out."""
        return []

    def folder_contents(self) -> dict[str, Any] | None:
        """What the split's folder holds besides samples, as plain data; None for an array source."""
        return None

    @abstractmethod
    def _fields_at(self, rows: slice | np.ndarray) -> dict[str, Any]:
        """The fields of a subclass that hold one entry per sample, at `rows`."""

    def identity(self) -> DatasetIdentity:
        """The identity by which a cache recognises this split later."""
        return DatasetIdentity(
            name=self.name,
            split=self.split,
            num_samples=len(self),
            image_size=self.image_size,
            class_names=self.class_names,
            content_digest=self.content_digest,
            multi_label=self.multi_label,
        )


def sample_key(data: bytes | memoryview) -> bytes:
    """The 16-byte content key of one sample's original bytes."""
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()
