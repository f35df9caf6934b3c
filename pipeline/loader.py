"""Decoded image batches for the build loop, loaded by one thread a few batches ahead of the device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import numpy as np
import torch

from cache_tools.format import Manifest
from cache_tools.images import ImageSet

LOADED_BATCHES_AHEAD = 3


class BatchLoader:
    """Decoded batches of the missing blocks, in order, loaded by one thread a few batches ahead."""

    def __init__(
        self,
        images: ImageSet,
        manifest: Manifest,
        missing: list[tuple[int, int]],
        batch_size: int,
        *,
        pin: bool,
    ) -> None:
        self._images, self._manifest, self._missing, self._batch_size, self._pin = (
            images,
            manifest,
            missing,
            batch_size,
            pin,
        )
        self._queue: queue.Queue[tuple[np.ndarray, torch.Tensor] | BaseException] = queue.Queue(LOADED_BATCHES_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)

    def __enter__(self) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        self._thread.start()
        return self._batches()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _batches(self) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        while True:
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def _run(self) -> None:
        try:
            for _, block in self._missing:
                rows = self._manifest.block(block)
                for start in range(rows.start, rows.stop, self._batch_size):
                    index = np.arange(start, min(start + self._batch_size, rows.stop), dtype=np.int64)
                    # A slice where possible: a resident set then hands out a view of its memory, without a copy.
                    pixels = torch.from_numpy(self._images.load(slice(int(index[0]), int(index[-1]) + 1)))
                    if not self._put((index, pixels.pin_memory() if self._pin else pixels)):
                        return
        except BaseException as error:
            self._put(error)

    def _put(self, item: tuple[np.ndarray, torch.Tensor] | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
