"""MPS has no float64: what needs it computes on the CPU. torch's fake tensors stand in for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cache_tools.system.devices import float64_device, in_float64, synchronise
from pipeline.evaluate.agreement import _counts
from train.loop import Sums

MPS, CPU = torch.device("mps"), torch.device("cpu")


class NoFloat64(TorchDispatchMode):
    """Fails, as MPS does, if an operation makes a float64 tensor there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "mps":
                assert tensor.dtype != torch.float64, f"{function} on MPS"
        return made


def rows(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device=MPS)


def test_sums_in_float64_are_made_on_the_cpu() -> None:
    with FakeTensorMode(), NoFloat64():
        labels = torch.empty(4, dtype=torch.int64, device=MPS)
        means = Sums()
        for _ in range(2):
            means.add({"loss": rows()}, rows(4, 3), labels)
        sums = means.state_dict()["sums"]
        assert (sums.device, sums.dtype) == (CPU, torch.float64)
        assert _counts(rows(4, 3), rows(4, 3), labels).device == CPU


def test_the_check_itself_can_fail() -> None:
    with pytest.raises(AssertionError, match="on MPS"), FakeTensorMode(), NoFloat64():
        rows(2).double()


def test_other_devices_keep_their_tensors() -> None:
    values = torch.tensor([1.5, 2.0])
    assert in_float64(values).dtype == torch.float64
    assert float64_device(CPU) == CPU
    assert float64_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert float64_device(MPS) == CPU
    synchronise(CPU)
