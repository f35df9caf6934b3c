"""Memory of the process and of the device: keep freed buffers, release unused ones, recognise that memory ran out."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cache_tools.errors import OutOfMemoryError

if TYPE_CHECKING:
    import torch

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# torch raises a plain RuntimeError when an allocation on the CPU or inside a CUDA library fails, and Python does where
# there is no memory for the stack of a thread.
_ALLOCATION_FAILED = re.compile(
    "out of memory|allocate memory|enough memory|alloc_failed|can't start new thread"
    "|unable to find an engine"  # cuDNN: no algorithm has room for its workspace
    "|could not create a primitive$",  # oneDNN: no room for the code of a kernel
    re.IGNORECASE,
)
CONTEXT_BYTES = 1 << 30
"""For what a process holds of a CUDA device beside torch's memory: CUDA's context, kernels, and libraries."""
_LARGEST_KEPT, _MOST_KEPT = 1 << 30, (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let glibc reuse large freed buffers (up to 1 GiB each, 2 GiB in all) instead of returning them to the system.

    By default every activation of 32 MB or more is a new mapping, whose pages the kernel clears one fault at a time.
    That takes a sixth of the time of forward passes on a CPU. The setting holds for the whole process, so commands
    make it and libraries do not.

    Returns:
        True if it was set; False, with nothing changed, where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)) and bool(mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT))


def release_memory(device: torch.device) -> None:
    """Collect garbage (tracebacks and optimisers are in reference cycles) and empty the device's cache of blocks."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
    elif device.type == "mps":
        import torch

        torch.mps.empty_cache()


def free_memory(device: torch.device) -> int:
    """Free memory of a device, in bytes; on the CPU at most what the control group leaves."""
    if device.type == "cuda":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch has it, and gives it
        return torch.cuda.mem_get_info(device)[0] + unused
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (text := (group / "memory.max").read_text().strip()) != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(
            stat["inactive_file"]
        )  # without the page cache, which shrinks on demand
        available = min(available, int(text) - used)
    return max(available, 0)


def peak_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that this process has held at most: torch's, and an allowance for CUDA; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    import torch

    return torch.cuda.max_memory_reserved(device) + CONTEXT_BYTES


def drop_tracebacks(error: Exception) -> Exception:
    """Clear the tracebacks of an error and of its causes: their frames hold every tensor of the failed work."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of Python, torch or CUDA says that the process or the device ran out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _ALLOCATION_FAILED.search(str(error)[:300]) is not None


@contextmanager
def raise_on_out_of_memory(where: str, next_step: str) -> Iterator[None]:
    """Turn every form of running out of memory into one error.

    Raises:
        OutOfMemoryError: too little memory for the work inside.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        found = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise OutOfMemoryError("not enough memory", where=where, found=found, next_step=next_step) from error
