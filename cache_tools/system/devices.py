"""What differs between devices: float64, which Apple's MPS does not have, and waiting for queued work."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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
