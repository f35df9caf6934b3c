"""Store a finished epoch in a thread, while the next one trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class BackgroundWriter:
    """Writes files in a thread, one piece of work after the other. An error is raised by all calls that follow it."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether all work has ended, well or not."""
        return self._last is None or self._last.done()

    def begin(self, work: Callable[[], None]) -> None:
        """Do some work after what was begun before, for which this waits."""
        self.wait()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="state")
        self._last = self._pool.submit(work)

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            Exception: what went wrong in the thread.
        """
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Stop the thread after its work."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)


class Snapshot:
    """A copy of a training state as it is now, on the host. Training may go on at once.

    From CUDA the copies go to pinned memory, in the order of the work that was launched before and after them.

    Args:
        state: mappings, lists and tuples of tensors and plain values.
    """

    def __init__(self, state: Any, device: torch.device) -> None:
        self._copies: dict[tuple[Any, ...], Tensor] = {}
        self._state = self._copied(state)
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(torch.cuda.current_stream(device))

    def get(self) -> Any:
        """The state; waits for its copies."""
        if self._event is not None:
            self._event.synchronize()
        return self._state

    def _copied(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._copied_tensor(value.detach())
        if isinstance(value, dict):
            copied = copy.copy(value)  # with the versions of modules that a state dict has
            for name, each in value.items():
                copied[name] = self._copied(each)
            return copied
        if isinstance(value, list | tuple):
            return type(value)(map(self._copied, value))
        return value

    def _copied_tensor(self, tensor: Tensor) -> Tensor:
        # Tensors that share their memory still do afterwards, as `torch.save` would store them.
        layout = tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
        key = (tensor.untyped_storage()._cdata, *layout)
        if key not in self._copies:
            if tensor.is_cuda:
                host = torch.empty_like(tensor, device="cpu", pin_memory=True)
                self._copies[key] = host.copy_(tensor, non_blocking=True)
            else:
                self._copies[key] = tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()
        return self._copies[key]
