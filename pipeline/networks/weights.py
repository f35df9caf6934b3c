"""Check, fingerprint and run the weights of frozen networks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cache_tools.format.recipe import Precision

_DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def weights_digest(network: nn.Module) -> str:
    """64 hex digits of sha256 over names, dtypes, shapes and bytes of all tensors, whatever the file format."""
    digest = hashlib.sha256()
    state = network.state_dict()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def freeze(network: nn.Module, device: torch.device) -> nn.Module:
    """Put a network on the device in eval mode, without gradients; channels last on CUDA, for faster convolutions."""
    network = network.eval().requires_grad_(False).to(device)
    return network.to(memory_format=torch.channels_last) if device.type == "cuda" else network


def as_network_input(images_NCHW: torch.Tensor) -> torch.Tensor:
    """The images in the memory format that `freeze` chose for the weights."""
    return images_NCHW.contiguous(memory_format=torch.channels_last) if images_NCHW.is_cuda else images_NCHW


@contextmanager
def quick_kernels(device: torch.device) -> Iterator[None]:
    """Inside, on CUDA, cuDNN looks for its quickest algorithms, and float32 matrix products use TF32, as it does.

    Not in a run that asks for deterministic kernels. Nothing changes on other devices.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.set_float32_matmul_precision(before[1])


def mixed_precision(device: torch.device, precision: Precision) -> torch.autocast:
    """Autocast for a forward pass; `float32` switches it off even if the caller has it on."""
    enabled = precision != "float32"
    return torch.autocast(device.type, dtype=_DTYPES[precision] if enabled else None, enabled=enabled)
