"""Keeping freed memory: the second of two large allocations costs no page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cache_tools.errors import DeviceError
from cache_tools.memory import keep_freed_memory, lacks_memory, memory_told

FAULTS = """
import resource, sys, numpy
from cache_tools.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.ones(100 << 20, dtype=numpy.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = faults(), faults()
print(first, second)
"""


def counted(how: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_freed_buffer_is_used_again():
    first, second = counted("kept")
    assert second < first / 4
    first, second = counted("given back")
    assert second > first / 2


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("unsupported memory format option Preserve"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_what_lacks_memory_is_told_so(error: Exception, lacking: bool) -> None:
    assert lacks_memory(error) is lacking
    with pytest.raises(DeviceError if lacking else type(error)), memory_told("resnet8 on cpu", "take less"):
        raise error
