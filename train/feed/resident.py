"""Pixels from memory: of the training device, or of the machine, from where they go to the device batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch

from cache_tools.console import Progress, warn
from cache_tools.decoding.packing import pack_in_memory
from cache_tools.decoding.service import load_canvases
from cache_tools.images.arrays import ArrayImages
from cache_tools.images.encoded import EncodedImages
from cache_tools.images.image_set import ImageSet
from cache_tools.system.devices import copy_to
from cache_tools.views.recipe import Drawn, ViewRecipe
from train.feed.base import EpochPlan, Feed
from train.feed.streaming import StreamingFeed

PIECE_BYTES = 32 << 20
PROGRESS_FROM = 5000  # images; fewer are loaded in seconds


class ResidentFeed(Feed):
    """All pixels of the split on the device: an epoch's view is made at once, and a batch is a slice of it."""

    _resident: torch.Tensor | None = None

    def _drawn(self, rows: np.ndarray, view: int) -> Sequence[Drawn]:
        """The draws of each piece of an epoch."""
        size = self.images.image_size
        return [self.views.draw(self._numbers(rows[piece]), view, size) for piece in pieces(self.images, len(rows))]

    def _pixels(self, plan: EpochPlan, index: torch.Tensor) -> Iterator[torch.Tensor]:
        if self._resident is None:
            self._resident = load_all(self.images, self.device)
        size, view, rows = self.views.output_size(self.images.image_size), plan.view, plan.rows
        # In the order in memory that convolutions want: a batch of it is not copied again.
        shape, layout = (len(rows), 3, *size), torch.channels_last
        pixels = torch.empty(shape, dtype=torch.uint8, device=self.device, memory_format=layout)
        for piece, drawn in zip(pieces(self.images, len(rows)), plan.drawn, strict=True):
            shown = index[piece]
            if self.views.mixes(view):
                shown = copy_to(torch.from_numpy(self.views.with_partners(rows[piece], view)), self.device)
            chosen = self._resident.index_select(0, shown)
            pixels[piece] = self.views.apply(chosen, self._numbers(rows[piece]), view, drawn)
        for start, stop in plan.bounds:
            yield pixels[start:stop]


class HostFeed(StreamingFeed):
    """All images of the split in the memory of the machine, from where batches go to the device as they are needed.

    It holds their canvases, or where views crop the original pictures, these. The memory is not page-locked, because
    only a batch that has been gathered is copied.
    """

    _is_loaded = False

    def _pixels(self, plan: EpochPlan, index: torch.Tensor) -> Iterator[torch.Tensor]:
        if not self._is_loaded and not self.images.resident:
            self.images = _in_memory(self.images, self.views)
        self._is_loaded = True
        return super()._pixels(plan, index)


def load_all(images: ImageSet, device: torch.device) -> torch.Tensor:
    """The canvases of all images, uint8 [N, 3, H, W] on a device."""
    if images.resident and device.type == "cpu":
        return torch.from_numpy(images.load(slice(None)))  # shares the source's memory and is never written
    resident = torch.empty((len(images), 3, *images.image_size), dtype=torch.uint8, device=device)
    load = load_canvases(images)
    is_long = len(images) >= PROGRESS_FROM and not images.resident
    with Progress("load images", len(images), "images") if is_long else nullcontext() as progress:
        for rows in pieces(images, len(images)):
            resident[rows] = torch.from_numpy(load(rows)).to(device)
            if progress is not None:
                progress.advance(rows.stop - rows.start)
    return resident


def pieces(images: ImageSet, count: int) -> Iterator[slice]:
    """So many rows, in pieces small enough to keep temporary tensors small."""
    height, width = images.image_size
    rows = max(PIECE_BYTES // (3 * height * width), 1)
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def _in_memory(images: ImageSet, views: ViewRecipe) -> ImageSet:
    """The same images, from memory."""
    if views.box_op is None:
        names = ("name", "split", "class_names", "labels", "keys", "image_size")
        canvases = load_all(images, torch.device("cpu")).numpy()
        return ArrayImages(**{name: getattr(images, name) for name in names}, pixels=canvases)
    assert isinstance(images, EncodedImages), "others are in memory"
    if (packed := pack_in_memory(images)) is None:
        warn("the pictures take more memory than a part of them promised: they are decoded in every epoch")
    return packed or images
