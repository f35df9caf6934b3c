"""Memory of the process and of the device: what a network frees and asks for again stays, what it has left goes."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
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
