"""Images that are stored as encoded files (JPEG, PNG, …) and decoded on demand: in folders, and in tables."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from cache_tools.errors import DataError
from cache_tools.images.decode import Needs, PixelRules, decode_image, decode_picture, whole_images_only
from cache_tools.images.image_set import ImageSet, Interpolation, sample_key
from cache_tools.images.index import num_workers
from cache_tools.images.recipe import WHITE, DatasetIdentity
from cache_tools.images.summary import FolderSummary

DEFAULT_IMAGE_SIZE = 224


@dataclass(frozen=True, eq=False, kw_only=True)
class EncodedImages(ImageSet):
    """A split of encoded images, decoded in threads (PIL releases the interpreter lock).

    Attributes:
        rules: what decoding needs to know besides the bytes.
        summary: what the folder of the split holds besides its samples.
        interpolation: with which images are resized to the canvas.
    """

    rules: PixelRules
    summary: FolderSummary
    interpolation: Interpolation = "bicubic"

    @abstractmethod
    def read(self, sample: int) -> bytes:
        """The bytes of one image.

        Raises:
            DataError: they cannot be read, or there are none.
        """

    @abstractmethod
    def name_of(self, sample: int) -> str:
        """The place of one image below `summary.root`, for messages."""

    def place_of(self, sample: int) -> str:
        """The whole path of one image, for messages."""
        return f"{self.summary.root}/{self.name_of(sample)}"

    def header_sizes(self) -> np.ndarray | None:
        """The (height, width) of each image as its header says, before it is turned upright, int32 [N, 2].

        An index has them, so that no image is read; zeros are unknown. None for sources without an index.
        """
        return None

    def source_of(self, sample: int) -> str | bytes:
        """What another process reads one image from: the path of its file, or its bytes.

        Raises:
            DataError: as `read`.
        """
        return self.read(sample)

    @property
    def resident(self) -> bool:
        return False

    def load(self, index: np.ndarray | slice) -> np.ndarray:
        side = self.image_size[0]
        pixels = np.empty((len(np.arange(len(self))[index]), 3, *self.image_size), np.uint8)

        def fill(row: int, data: bytes, place: str) -> None:
            pixels[row] = decode_image(data, side, place, self.rules, self.interpolation).transpose(2, 0, 1)

        self._read_each(index, fill)
        return pixels

    def decoded_for(self, needed: Needs | None) -> Self:
        return self if needed == self.rules.needed else replace(self, rules=self.rules.with_needs(needed))

    def at(self, side: int, interpolation: Interpolation = "bicubic") -> Self:
        return replace(self, image_size=(side, side), interpolation=interpolation)

    def pictures(self, index: np.ndarray | slice) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}

        def keep(row: int, data: bytes, place: str) -> None:
            found[row] = decode_picture(data, place, self.rules).transpose(2, 0, 1)

        self._read_each(index, keep)
        return [found[row] for row in range(len(found))]

    def _read_each(self, index: np.ndarray | slice, use: Callable[[int, bytes, str], None]) -> None:
        """Read images in threads and call `use(row, data, place)` there; raises the first error in sample order."""
        chosen = np.arange(len(self))[index]

        def read(row: int) -> None:
            sample = int(chosen[row])
            data = self.read(sample)
            check_unchanged(data, self.keys[sample].tobytes(), self.place_of(sample))
            use(row, data, self.place_of(sample))

        with whole_images_only(), ThreadPoolExecutor(num_workers()) as pool:
            for _ in pool.map(read, range(len(chosen))):
                pass

    def identity(self) -> DatasetIdentity:
        changes: dict[str, Any] = {"value_range": self.rules.value_range}
        if self.rules.background != WHITE:
            changes["background"] = self.rules.background
        return super().identity().model_copy(update=changes)

    def notes(self) -> list[str]:
        return self.summary.lines()

    def folder_contents(self) -> dict[str, Any]:
        return self.summary.to_json()


def check_unchanged(data: bytes, key: bytes, place: str) -> None:
    """Raise DataError unless these are the bytes of an image that had this content key when its split was opened."""
    if sample_key(data) != key:
        raise DataError(
            "image changed since the folder was opened",
            where=place,
            next_step="run the command again when no program writes to the folder; if a tar shard differs from the "
            "index that came with it, copy both again",
        )
