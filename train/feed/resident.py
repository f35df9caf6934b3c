"""Pixels from the memory of the training device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from cache_tools.decoding.service import load_canvases
from train.feed.base import Feed

PIECE_BYTES = 32 << 20


class ResidentFeed(Feed):
    """All pixels of the split on the device: an epoch's view is made at once, and a batch is a slice of it."""

    _resident: torch.Tensor | None = None

    def _pixels(self, order: np.ndarray, view: int, bounds: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        if self._resident is None:
            self._resident = self._load_all()
        size = self.views.output_size(self.images.image_size)
        pixels = torch.empty((len(order), 3, *size), dtype=torch.uint8, device=self.device)
        for piece in self._pieces():
            rows = order[piece]
            shown = self.views.with_partners(rows, view) if self.views.mixes(view) else rows
            chosen = self._resident.index_select(0, torch.from_numpy(shown).to(self.device))
            pixels[piece] = self.views.apply(chosen, self._numbers(rows), view)
        for start, stop in bounds:
            yield pixels[start:stop]

    def _load_all(self) -> torch.Tensor:
        if self.images.resident and self.device.type == "cpu":
            return torch.from_numpy(self.images.load(slice(None)))  # shares the source's memory and is never written
        resident = torch.empty((len(self.images), 3, *self.images.image_size), dtype=torch.uint8, device=self.device)
        load = load_canvases(self.images)
        for rows in self._pieces():
            resident[rows] = torch.from_numpy(load(rows)).to(self.device)
        return resident

    def _pieces(self) -> Iterator[slice]:
        """All rows, in pieces small enough to keep temporary tensors small."""
        height, width = self.images.image_size
        rows, count = max(PIECE_BYTES // (3 * height * width), 1), len(self.images)
        return (slice(start, min(start + rows, count)) for start in range(0, count, rows))
