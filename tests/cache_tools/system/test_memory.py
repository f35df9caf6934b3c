"""cache_tools.system.memory: reuse of freed buffers, and which errors mean that memory ran out."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cache_tools.errors import OutOfMemoryError
from cache_tools.system.memory import is_out_of_memory, keep_freed_memory, raise_on_out_of_memory

FAULTS = """
import resource, sys, numpy
from cache_tools.system.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.ones(100 << 20, dtype=numpy.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = faults(), faults()
print(first, second)
"""


def page_faults(mode: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_freed_buffer_is_reused() -> None:
    first, second = page_faults("kept")
    assert second < first / 4
    first, second = page_faults("returned")
    assert second > first / 2


def test_nothing_changes_where_there_is_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("unsupported memory format option Preserve"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_every_way_to_run_out_of_memory_is_one_error(error: Exception, out_of_memory: bool) -> None:
    expected = OutOfMemoryError if out_of_memory else type(error)
    assert is_out_of_memory(error) is out_of_memory
    with pytest.raises(expected), raise_on_out_of_memory("resnet8 on cpu", "take less"):
        raise error


def test_the_error_names_the_innermost_work() -> None:
    with (
        pytest.raises(OutOfMemoryError, match="resnet8 on cpu"),
        raise_on_out_of_memory("a sweep", "wait"),
        raise_on_out_of_memory("resnet8 on cpu", "take less"),
    ):
        raise MemoryError
