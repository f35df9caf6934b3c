"""The inference cost of a student: parameters, FLOPs, latency."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cache_tools.config import Frozen
from cache_tools.console import device_name
from cache_tools.errors import RecipeError
from cache_tools.system.devices import synchronise
from cache_tools.system.memory import is_out_of_memory

BATCH_SIZES = (1, 128)
WARM_UP_RUNS, MIN_RUNS, MAX_RUNS = 3, 5, 200


class Latency(Frozen):
    """Milliseconds of one forward pass of a batch: the median, and the 10th and 90th percentile, of `runs` passes."""

    batch_size: PositiveInt
    median_ms: PositiveFloat
    low_ms: PositiveFloat
    high_ms: PositiveFloat
    runs: PositiveInt

    @property
    def images_per_s(self) -> float:
        """Images per second at the median."""
        return 1e3 * self.batch_size / self.median_ms


class Cost(Frozen):
    """The cost of a student's forward pass.

    Attributes:
        parameters: number of trainable parameters, without buffers (running means).
        flops: of one image, by torch's counter: multiplications and additions of convolutions, matrix products and
            attention, so 2 per multiply-accumulate (twice the "MACs" or "FLOPs" of many papers). Batch norms,
            activations and pooling are not counted.
        latency: one entry per batch size, of the network alone: pixels are on the device and normalised.
        image_size: (height, width) of the images.
        device: the GPU's name, or "cpu".
        threads: of torch. Latency depends on it on the CPU, and hardly on a GPU.
    """

    parameters: int = Field(ge=0, lt=1 << 53)
    flops: int = Field(ge=0, lt=1 << 62)
    latency: tuple[Latency, ...]
    image_size: tuple[PositiveInt, PositiveInt]
    device: str
    threads: PositiveInt

    def latency_ms(self, batch_size: int) -> float:
        """The median latency of a measured batch size."""
        return next(entry.median_ms for entry in self.latency if entry.batch_size == batch_size)


def measure(
    student: nn.Module,
    image_size: tuple[int, int],
    device: torch.device | str,
    *,
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
    budget_s: float = 1.0,
) -> Cost:
    """Measure a copy of a student as it is used: eval mode, float32, channels-last, no gradients.

    Times are from CUDA events on a GPU and from the wall clock on the CPU. Each batch size is warmed up, then run at
    least five times, and up to 200 times within `budget_s` seconds. Other work on the machine slows the figures down.

    Args:
        image_size: (height, width).

    Raises:
        RecipeError: the network cannot take images of this size.
    """
    device = torch.device(device)
    model = copy.deepcopy(student).to(device).to(memory_format=torch.channels_last).eval()
    with torch.inference_mode():
        flops = count_flops(model, image_size)
        latency = tuple(_latency(model, _images(size, image_size, device), budget_s) for size in batch_sizes)
    return Cost(
        parameters=count_parameters(model),
        flops=flops,
        latency=latency,
        image_size=image_size,
        device=device_name(device),
        threads=torch.get_num_threads(),
    )


def count_parameters(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, image_size: tuple[int, int]) -> int:
    """Floating-point operations of the forward pass of one image, 2 per multiply-accumulate; see `Cost.flops`.

    Args:
        model: in eval mode, on any device.

    Raises:
        RecipeError: the network cannot take images of this size.
    """
    images = _images(1, image_size, next(model.parameters()).device)
    with (
        _explain_wrong_size(image_size),
        torch.inference_mode(),
        _unfused_attention(),
        FlopCounterMode(display=False) as counter,
    ):
        model(images)
    return counter.get_total_flops()


def check_images(
    model: nn.Module,
    image_size: tuple[int, int],
    next_step: str = "choose another --student, or build a cache with views of the size that it expects",
) -> None:
    """Check that a network takes images of this size, by a forward pass that changes nothing.

    Args:
        model: in eval mode, on any device.

    Raises:
        RecipeError: the network cannot take images of this size.
    """
    with _explain_wrong_size(image_size, next_step), torch.inference_mode():
        model(_images(1, image_size, next(model.parameters()).device))


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Compute attention as matrix products, which torch's counter knows on every device and in every version.

    It counts only some fused kernels: before torch 2.15 not the CPU's, and in no version the one that
    `nn.MultiheadAttention` uses in eval mode.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _explain_wrong_size(
    image_size: tuple[int, int],
    next_step: str = "choose another --student, or build a cache with views of the size that it expects",
) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, AssertionError, ValueError) as error:  # too small for its strides, or not the size of a ViT
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        size = f"{image_size[0]} × {image_size[1]} pixels"
        raise RecipeError(
            "the student cannot take images of this size",
            where=size,
            found=reason,
            next_step=next_step,
        ) from error


def _images(count: int, image_size: tuple[int, int], device: torch.device) -> Tensor:
    """Noise, drawn without changing torch's random state. Zeros would produce denormals, which are slow."""
    noise = torch.randn(count, 3, *image_size, generator=torch.Generator().manual_seed(0))
    return noise.to(device, memory_format=torch.channels_last)


def _latency(model: nn.Module, images: Tensor, budget_s: float) -> Latency:
    run = _timed_on_gpu if images.is_cuda else _timed
    for _ in range(WARM_UP_RUNS):
        run(model, images)
    times_ms: list[float] = []
    start = time.perf_counter()
    while len(times_ms) < MIN_RUNS or (time.perf_counter() - start < budget_s and len(times_ms) < MAX_RUNS):
        times_ms.append(run(model, images))
    deciles = statistics.quantiles(times_ms, n=10, method="inclusive")
    return Latency(
        batch_size=len(images),
        median_ms=statistics.median(times_ms),
        low_ms=deciles[0],
        high_ms=deciles[-1],
        runs=len(times_ms),
    )


def _timed(model: Callable[[Tensor], Tensor], images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    synchronise(images.device)
    return 1e3 * (time.perf_counter() - start)


def _timed_on_gpu(model: Callable[[Tensor], Tensor], images: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(images.device)
    start.record(stream)
    model(images)
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end)
