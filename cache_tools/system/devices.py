"""What differs between devices: copies, float64, which Apple's MPS does not have, seeds, and waiting for work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")


def copy_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device. The host goes on before the copy is finished only from pinned memory to CUDA.

    Any other copy that is not waited for may be read too early, or be made of memory that has other contents by then.
    """
    to_cuda = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.to(device, non_blocking=to_cuda and tensor.is_pinned())


def in_current_stream(device: torch.device, function: Callable[..., Value]) -> Callable[..., Value]:
    """A function whose work on CUDA joins the stream that is current now, whichever thread calls it.

    So what another thread makes needs no synchronisation: work that is launched later on this stream runs after it.
    """
    if device.type != "cuda":
        return function
    import torch

    stream = torch.cuda.current_stream(device)

    def call(*args: Any) -> Value:
        with torch.cuda.stream(stream):
            return function(*args)

    return call


@contextmanager
def seeded_on_cpu(seed: int) -> Iterator[None]:
    """Inside, the CPU's random numbers are those of a seed. Afterwards they go on; no other device changes."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64: on its device or, if that is MPS, on the CPU."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def float64_device(device: torch.device) -> torch.device:
    """The device on which `in_float64` puts tensors of this device."""
    import torch

    return torch.device("cpu") if device.type == "mps" else device


def synchronise(device: torch.device) -> None:
    """Wait until the device has done everything that was asked of it."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
