"""Decoded image batches for the build loop, loaded by one thread a few batches ahead of the device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from cache_tools.image_set import ImageSet
from cache_tools.manifest import Manifest

LOADED_BATCHES_AHEAD = 3
TICK_S = 0.5


class LoadedBatch(NamedTuple):
    """A batch of one block: its samples, int64 [B], and their canvases, uint8 [B, 3, H, W]."""

    view: int
    block: int
    samples: np.ndarray
    pixels: torch.Tensor


class BatchLoader:
    """Decoded batches of blocks, block by block in the order in which they are handed out.

    Args:
        blocks: (view, block) of each. The loading thread asks for the next when it needs it, and may have to wait.
    """

    def __init__(
        self,
        images: ImageSet,
        manifest: Manifest,
        blocks: Iterable[tuple[int, int]],
        batch_size: int,
        *,
        pin: bool,
    ) -> None:
        self._images, self._manifest, self._blocks = images, manifest, blocks
        self._batch_size, self._pin = batch_size, pin
        # None stands for the end.
        self._queue: queue.Queue[LoadedBatch | BaseException | None] = queue.Queue(LOADED_BATCHES_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)

    def __enter__(self) -> Iterator[LoadedBatch | None]:
        """Batches as they come; None twice a second while there is none."""
        self._thread.start()
        return self._batches()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _batches(self) -> Iterator[LoadedBatch | None]:
        while True:
            try:
                item = self._queue.get(timeout=TICK_S)
            except queue.Empty:
                yield None
                continue
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item

    def _run(self) -> None:
        try:
            for view, block in self._blocks:
                rows = self._manifest.block(block)
                for start in range(rows.start, rows.stop, self._batch_size):
                    stop = min(start + self._batch_size, rows.stop)
                    # A slice where possible: a resident set then hands out a view of its memory, without a copy.
                    pixels = torch.from_numpy(self._images.load(slice(start, stop)))
                    samples = np.arange(start, stop, dtype=np.int64)
                    if not self._put(LoadedBatch(view, block, samples, pixels.pin_memory() if self._pin else pixels)):
                        return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: LoadedBatch | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
