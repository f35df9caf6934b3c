"""Pixels that are decoded again in every epoch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from cache_tools.decoding.service import service_for, start_loading
from cache_tools.system.devices import copy_to, in_current_stream
from train.feed.base import EpochPlan, Feed

STREAM_DEPTH = 4


class StreamingFeed(Feed):
    """For splits that do not fit in memory: a background thread loads, copies and transforms the next few batches.

    Long runs decode in processes (`cache_tools.decoding`), which work on all of these batches at once.

    The thread issues its CUDA work on the same stream as training. So a batch needs no synchronisation: kernels that
    training launches later run after the batch is ready.
    """

    def _pixels(self, plan: EpochPlan, index: torch.Tensor) -> Iterator[torch.Tensor]:
        pending: deque[Future[torch.Tensor]] = deque()
        view, upcoming = plan.view, iter(plan.bounds)
        service = service_for(self.images, len(self.images) * self.epochs)
        finish = in_current_stream(self.device, self._finish)
        with ThreadPoolExecutor(1, thread_name_prefix="pixels") as pool:
            try:
                for _ in plan.bounds:
                    while len(pending) < STREAM_DEPTH and (bound := next(upcoming, None)) is not None:
                        rows = plan.rows[slice(*bound)]
                        numbers = self._numbers(rows)
                        on_gpu = self.device.type == "cuda"
                        load = start_loading(service, self.images, rows, numbers, [(self.views, view)], pin=on_gpu)
                        pending.append(pool.submit(finish, load, numbers, view))
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _finish(self, load: Callable[[], list[torch.Tensor]], numbers: np.ndarray, view: int) -> torch.Tensor:
        (pixels,) = load()
        return self.views.finish(copy_to(pixels, self.device), numbers, view)
