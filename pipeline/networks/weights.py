"""Check, fingerprint and run the weights of frozen networks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from cache_tools.format.recipe import Precision

_DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Modules of exactly these types give their weights to operations that autocast runs in half precision.
_CAST_BY_AUTOCAST = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, NonDynamicallyQuantizableLinear}


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


def convert_weights(network: nn.Module, precision: Precision, outputs: Callable[[], Sequence[torch.Tensor]]) -> bool:
    """Convert weights once that autocast would convert for every batch, if the outputs stay the same, bit for bit.

    These are the weights of linear layers and convolutions and, where autocast has a say in it, of attention.
    Everything else, such as norms, stays as it is, for autocast to decide. A network that also uses these weights in
    another way keeps them in float32.

    Args:
        outputs: a forward pass at this precision.

    Returns:
        Whether any were converted.
    """
    if precision == "float32":
        return False
    expected = outputs()
    # On the CPU attention has a kernel of its own for frozen networks, which autocast leaves in float32.
    for kinds in (_CAST_BY_AUTOCAST | {nn.MultiheadAttention}, _CAST_BY_AUTOCAST):
        places = [
            (module, name, parameter)
            for module in network.modules()
            if type(module) in kinds
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.dtype is torch.float32
        ]
        converted = {parameter: parameter.to(_DTYPES[precision]) for _, _, parameter in places}
        for module, name, parameter in places:
            setattr(module, name, nn.Parameter(converted[parameter], requires_grad=False))
        try:
            if all(torch.equal(one, other) for one, other in zip(outputs(), expected, strict=True)):
                return bool(places)
        except RuntimeError:  # of a network that computes with its weights itself, in float32
            pass
        for module, name, parameter in places:
            setattr(module, name, parameter)
    return False


def noise(size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Two canvases to try a network on, uint8 [2, 3, height, width]."""
    return torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(
        device
    )


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


def kernel_settings(device: torch.device, *, compiled: bool = False) -> dict[str, str]:
    """What determines the last bits of outputs, for the provenance of a cache: `quick_kernels`, and a compiler."""
    quick = {"float32_products": "tf32", "convolutions": "tf32, quickest of cudnn"} if device.type == "cuda" else {}
    return quick | ({"networks": "torch.compile"} if compiled else {})


def mixed_precision(device: torch.device, precision: Precision) -> torch.autocast:
    """Autocast for a forward pass; `float32` switches it off even if the caller has it on."""
    enabled = precision != "float32"
    return torch.autocast(device.type, dtype=_DTYPES[precision] if enabled else None, enabled=enabled)
