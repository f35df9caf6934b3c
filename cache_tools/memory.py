"""Memory of the process and of the device: what a network frees and asks for again stays, what it has left goes."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cache_tools.errors import DeviceError

if TYPE_CHECKING:
    import torch

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# As allocators of the CPU and libraries of CUDA say it.
_LACKING = re.compile("out of memory|allocate memory|enough memory|alloc_failed", re.IGNORECASE)
_LARGEST_KEPT, _MOST_KEPT = 1 << 30, (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let glibc reuse large freed buffers (up to 1 GiB each, 2 GiB in all) instead of giving them back to the system.

    By default every activation of 32 MB or more is a new mapping, whose pages the kernel clears one fault at a time:
    a sixth of the time of a CPU's forward passes. It holds for the whole process, so it is for commands, not for
    libraries.

    Returns:
        Whether it was set; False, and nothing is changed, where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)) and bool(mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT))


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds any more: tracebacks and optimisers are in cycles, CUDA keeps blocks for later."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def lacks_memory(error: Exception) -> bool:
    """Whether memory did not suffice, of the process or of the device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _LACKING.search(str(error)[:300]) is not None


@contextmanager
def memory_told(where: str, next_step: str) -> Iterator[None]:
    """What lacks memory inside is one clear error.

    Raises:
        DeviceError: memory did not suffice.
    """
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        found = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DeviceError("memory does not suffice", where=where, found=found, next_step=next_step) from error
