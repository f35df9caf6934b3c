"""An image set that reads its pixels from a pixel file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from cache_tools.decoding.pixel_file import Integers, PackedPicture, PixelFile
from cache_tools.images.decode import Needs
from cache_tools.images.encoded import EncodedImages
from cache_tools.images.image_set import Interpolation


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedImages(EncodedImages):
    """Images whose pixels are read from a pixel file instead of being decoded; the same pixels.

    Attributes:
        source: the same images as they were opened.
        file: that holds their canvases, or their pictures at their own size.
        places: int64 [N], of each image in the index of the file.
        canvases: whether the file holds canvases.
    """

    source: EncodedImages
    file: PixelFile
    places: Integers
    canvases: bool

    @classmethod
    def of(cls, source: EncodedImages, file: PixelFile, places: Integers, *, canvases: bool) -> PackedImages:
        shared = {field.name: getattr(source, field.name) for field in fields(EncodedImages)}
        return cls(**shared, source=source, file=file, places=places, canvases=canvases)

    def place_in_file(self, sample: int) -> PackedPicture:
        """What another process needs to read a picture from the file."""
        return self.file.place(int(self.places[sample]))

    def read(self, sample: int) -> bytes:
        return self.source.read(sample)

    def name_of(self, sample: int) -> str:
        return self.source.name_of(sample)

    def header_sizes(self) -> np.ndarray | None:
        return self.source.header_sizes()

    def load(self, index: np.ndarray | slice) -> np.ndarray:
        if not self.canvases:
            return self.source.load(index)
        places = self.places[index]
        pixels = np.empty((len(places), 3, *self.image_size), np.uint8)
        self.file.read_canvases(places, pixels)
        return pixels

    def pictures(self, index: np.ndarray | slice) -> list[np.ndarray]:
        if self.canvases:
            return self.source.pictures(index)
        return [picture.transpose(2, 0, 1) for picture in self.file.pictures(self.places[index])]

    def decoded_for(self, needed: Needs | None) -> Self:
        return self if needed == self.rules.needed else self.source.decoded_for(needed)  # type: ignore[return-value]

    def at(self, side: int, interpolation: Interpolation = "bicubic") -> Self:
        return self.source.at(side, interpolation)  # type: ignore[return-value]

    def _fields_at(self, rows: slice | np.ndarray) -> dict[str, Any]:
        return {"source": self.source.subset(rows), "places": self.places[rows]}
