"""The pixels of a view, on CPU and CUDA: uint8 in, uint8 out, in integer arithmetic only.

Integers cannot be rounded differently by a library, a device, a thread count or a matmul precision setting, so the
student's pixels equal the teacher's bit for bit. `cache_tools/views/ops.py` draws the parameters. A change of any
result here needs a new version of ViewRecipe.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cache_tools.errors import DataError
from cache_tools.views import augment_pixels
from cache_tools.views.augment import ChoiceOp, Rotation
from cache_tools.views.boxes import Interpolation, RandomResizedCrop
from cache_tools.views.crop import crop_batch, crop_picture
from cache_tools.views.ops import (
    HUE_STEPS,
    ONE,
    ColourJitter,
    Flip,
    Identity,
    Integers,
    PadCrop,
    RandomErasing,
)

if TYPE_CHECKING:
    from cache_tools.views.ops import Op

Parameters = Mapping[str, Tensor]  # name → int64 [N], on the pixels' device

BATCH_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 25}  # per temporary: a core's L2 cache in int32; 128 MiB
COLOUR_BITS = 16
LUMA = (19_595, 38_470, 7_471)  # ITU-R 601 in 1/65536, adding up to 65536
WEIGHT_BITS = 15


def apply(
    ops: tuple[Op, ...],
    drawn: Mapping[str, Integers],
    output_size: tuple[int, int],
    images_NCHW: Tensor,
    version: int = 1,
) -> Tensor:
    """See `ViewRecipe.finish`. Samples are processed in sub-batches, so memory is bounded.

    Args:
        drawn: `ViewRecipe.parameters` for the samples of the images, one per image.
        version: of the view recipe.
    """
    device, size = images_NCHW.device, (images_NCHW.shape[2], images_NCHW.shape[3])
    parameters = _on_device(drawn, len(ops), device)
    runs = _runs(ops)
    views = torch.empty(len(images_NCHW), 3, *output_size, dtype=torch.uint8, device=device)
    rows = max(1, BATCH_ELEMENTS["cpu" if device.type == "cpu" else "cuda"] // _widest(ops, size))

    def make(start: int) -> None:
        part = slice(start, start + rows)
        pixels = images_NCHW[part]
        for run in runs:
            position, first = run[0]
            if isinstance(first, ChoiceOp | Rotation) or (version == 2 and isinstance(first, ColourJitter)):
                numbers = {key.split(".")[2]: v[part] for key, v in drawn.items() if key.startswith(f"{position}.")}
                pixels = augment_pixels.change(pixels, first, numbers)
                continue
            steps = [
                (op, {name: values[part] for name, values in parameters[position].items()}) for position, op in run
            ]
            pixels = move(pixels, steps) if isinstance(steps[0][0], PadCrop | Flip) else _change(pixels, *steps[0])
        views[part] = pixels

    _each(make, range(0, len(images_NCHW), rows), device)
    return views


def crop(
    images: Tensor | Sequence[Tensor], boxes: Mapping[str, Integers], size: tuple[int, int], how: Interpolation
) -> Tensor:
    """The box of each image or picture at a size: uint8 [N, 3, *size], on the device of a batch, else on the CPU."""
    device = images.device if isinstance(images, Tensor) else torch.device("cpu")
    made = torch.empty(len(images), 3, *size, dtype=torch.uint8, device=device)
    if isinstance(images, Tensor):
        widest = 3 * max(images.shape[2], size[0]) * max(images.shape[3], size[1])
        rows = max(1, BATCH_ELEMENTS["cpu" if device.type == "cpu" else "cuda"] // widest)

        def make(start: int) -> None:
            part = slice(start, start + rows)
            made[part] = crop_batch(images[part], {name: values[part] for name, values in boxes.items()}, size, how)
    else:
        rows = 1
        table = np.stack([boxes[name] for name in ("top", "left", "height", "width")], axis=1).tolist()

        def make(start: int) -> None:
            made[start] = crop_picture(images[start].permute(1, 2, 0), table[start], size, how)

    _each(make, range(0, len(images), rows), device)
    return made


def picture_sizes(images: Tensor | Sequence[Tensor], count: int) -> Integers:
    """The (height, width) of each image or picture, int64 [count, 2].

    Raises:
        DataError: not uint8 [count, 3, H, W], nor a list of `count` uint8 [3, H, W] on the CPU.
    """
    if isinstance(images, Tensor):
        check(images, count)
        return np.broadcast_to(np.array(images.shape[2:], dtype=np.int64), (count, 2))
    for picture in images:
        is_tensor = isinstance(picture, Tensor)
        if not is_tensor or picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
            found = f"{picture.dtype} {list(picture.shape)}" if is_tensor else type(picture).__name__
            raise DataError("views are made of uint8 RGB pictures", expected="torch.uint8 [3, H, W]", found=found)
        if picture.device.type != "cpu":
            raise DataError("pictures of several sizes are cropped on the CPU", expected="cpu", found=picture.device)
    _check_count(len(images), count)
    return np.array([picture.shape[1:] for picture in images], dtype=np.int64).reshape(count, 2)


def check(images: Any, count: int) -> None:
    """Raise DataError unless the images are uint8 [count, 3, H, W]."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise DataError("views are made of uint8 RGB images", expected="torch.uint8 [N, 3, H, W]", found=found)
    _check_count(len(images), count)


def rows_at_once(images_NCHW: Tensor) -> int:
    """The images of a sub-batch whose temporaries fit."""
    return max(1, BATCH_ELEMENTS["cpu" if images_NCHW.device.type == "cpu" else "cuda"] // images_NCHW[0].numel())


def _check_count(found: int, expected: int) -> None:
    if found != expected:
        raise DataError(
            "the number of images differs from the number of sample indices",
            expected=f"{expected} images",
            found=found,
        )


def move(images_NCHW: Tensor, steps: Sequence[tuple[Op, Parameters]]) -> Tensor:
    """Apply consecutive pad-crops and flips as one gather; they share at most one fill level.

    Both ops move whole rows and columns, so their composition is a row map [N, H] and a column map [N, W]. The value H
    (or W) in a map stands for a row (or column) of the fill level.
    """
    count, channels, height, width = images_NCHW.shape
    device = images_NCHW.device
    rows = torch.arange(height, device=device).expand(count, -1)
    columns = torch.arange(width, device=device).expand(count, -1)
    fill = 0
    for op, values in steps:
        if isinstance(op, PadCrop):
            reflect = op.fill == "reflect"
            rows = _shifted(rows, values["top"] - op.padding, reflect)
            columns = _shifted(columns, values["left"] - op.padding, reflect)
            fill = op.fill if isinstance(op.fill, int) else fill
        else:
            columns = torch.where(values["flipped"].bool()[:, None], columns.flip(1), columns)
    planes = images_NCHW.contiguous()
    if any(isinstance(op, PadCrop) for op, _ in steps):
        planes = torch.nn.functional.pad(planes, (0, 1, 0, 1), value=fill).view(-1, width + 1)
        first_row = torch.arange(0, len(planes), height + 1, device=device).view(count, channels, 1)
        planes = planes.index_select(0, (first_row + rows[:, None]).view(-1))
    lines = planes.view(count, channels * height, planes.shape[-1])
    return lines.gather(2, columns[:, None].expand(-1, channels * height, -1)).view(images_NCHW.shape)


def erase(images_NCHW: Tensor, values: Parameters) -> Tensor:
    """Paint the box of each image in its colour."""
    height, width = images_NCHW.shape[2:]
    rows = _inside(values["top"], values["height"], height).view(-1, 1, height, 1)
    columns = _inside(values["left"], values["width"], width).view(-1, 1, 1, width)
    colour = torch.stack([values[name] for name in ("red", "green", "blue")], dim=1).to(torch.uint8)
    return torch.where(rows & columns, colour[:, :, None, None], images_NCHW)


def jitter(images_NCHW: Tensor, op: ColourJitter, values: Mapping[str, Tensor]) -> Tensor:
    """Change brightness, contrast, saturation and hue, each rounded and clamped to 0 … 255.

    Brightness is x·f; contrast is m + (x − m)·f for the image's rounded mean luma m; saturation is l + (x − l)·f for
    the pixel's luma l; hue turns RGB about the grey axis. A strength of 0 changes nothing, so the step is skipped.
    """
    pixels = images_NCHW.to(torch.int32, memory_format=torch.contiguous_format)
    factors = {
        name: values[name].to(torch.int32).view(-1, 1, 1, 1) for name in ("brightness", "contrast", "saturation")
    }
    if op.brightness:
        pixels = _to_grey_level(pixels.mul_(factors["brightness"]))
    if op.contrast:
        total = luma(pixels).sum(dim=(2, 3), keepdim=True, dtype=torch.int64)
        area = pixels.shape[2] * pixels.shape[3]
        mean = torch.div(total + area // 2, area, rounding_mode="floor").to(torch.int32)
        pixels = _to_grey_level(pixels.mul_(factors["contrast"]).add_(mean * (ONE - factors["contrast"])))
    if op.saturation:
        grey = luma(pixels).mul_(ONE - factors["saturation"])
        pixels = _to_grey_level(pixels.mul_(factors["saturation"]).add_(grey))
    if op.hue:
        same, following, previous = _hue_table(pixels.device)[:, values["hue"] % HUE_STEPS].view(3, -1, 1, 1, 1)
        turned = pixels * same
        for channel in range(3):
            turned[:, channel].addcmul_(pixels[:, (channel + 1) % 3], following[:, 0])
            turned[:, channel].addcmul_(pixels[:, channel - 1], previous[:, 0])
        pixels = _to_grey_level(turned)
    return pixels.to(torch.uint8)


def crop_and_resize(images_NCHW: Tensor, values: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Resize each image's box (`top`, `left`, `height`, `width`) to `size`: rows first, uint8 between the passes."""
    pixels = _resample_rows(images_NCHW, values["top"], values["height"], size[0])
    pixels = _resample_rows(pixels.transpose(2, 3).contiguous(), values["left"], values["width"], size[1])
    return pixels.transpose(2, 3)


def luma(pixels_NCHW: Tensor) -> Tensor:
    """int32 [N, 1, H, W]: (19595 R + 38470 G + 7471 B + 2¹⁵) / 2¹⁶ rounded down, 0 … 255."""
    red, green, blue = (pixels_NCHW[:, channel : channel + 1] for channel in range(3))
    total = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    return total.add_(1 << COLOUR_BITS - 1).bitwise_right_shift_(COLOUR_BITS)


def hue_weights(step: int) -> tuple[float, float]:
    """Weights of the following and the previous channel for a turn of step/1024, times 65536, before rounding."""
    angle = 2 * math.pi * step / HUE_STEPS
    common, odd = (1 - math.cos(angle)) / 3, math.sin(angle) / math.sqrt(3)
    return (common - odd) * ONE, (common + odd) * ONE


def triangle_taps(length_N: Tensor, source: int, size: int) -> tuple[Tensor, Tensor]:
    """The source rows of each output row and their weights: a triangle filter, widened for shrinking (antialiased).

    Output row i of `size` has its centre at (i + ½)·length/size. Source row j weighs 1 − |j + ½ − centre| / w with
    w = max(1, length/size), if that is positive and j is inside the box. The weights are multiplied by
    2·max(length, size), which makes them whole, and scaled to add up to 2¹⁵ exactly: they are rounded down, and the
    (first) largest takes the rest.

    Args:
        length_N: int64 [N], the number of rows of each box.
        source: the number of rows of the image, an upper bound of every length.
        size: the number of output rows.

    Returns:
        positions in the box int64 [N, size, K] (0 … length−1) and weights int32 [N, size, K].
    """
    device = length_N.device
    count = -(-2 * max(source, size) // size)  # whole numbers in an open interval of length 2·max(length, size)/size
    order = torch.arange(count, device=device)
    length = length_N.view(-1, 1, 1)
    width = 2 * length.clamp(min=size)
    centre = (2 * torch.arange(size, device=device).view(1, -1, 1) + 1) * length
    place = torch.div(centre - width - size, 2 * size, rounding_mode="floor") + 1 + order
    raw = (width - ((2 * place + 1) * size - centre).abs()).clamp(min=0)
    raw = torch.where((place >= 0) & (place < length), raw, 0)
    weights = torch.div(raw << WEIGHT_BITS, raw.sum(2, keepdim=True), rounding_mode="floor")
    rank = raw * count - order  # all different, so exactly one is the largest
    rest = (1 << WEIGHT_BITS) - weights.sum(2, keepdim=True)
    weights = torch.where(rank == rank.amax(2, keepdim=True), weights + rest, weights)
    return torch.minimum(place.clamp(min=0), length - 1), weights.to(torch.int32)


def _change(pixels: Tensor, op: Op, values: Parameters) -> Tensor:
    match op:
        case ColourJitter():
            return jitter(pixels, op, values)
        case RandomResizedCrop():
            return crop_and_resize(pixels, values, op.output_size((pixels.shape[2], pixels.shape[3])))
        case RandomErasing():
            return erase(pixels, values)
        case Identity():
            return pixels
    raise AssertionError(f"no pixels for {op}")


def _runs(ops: tuple[Op, ...]) -> list[list[tuple[int, Op]]]:
    """(position, op) in order; neighbouring pad-crops and flips form one run unless their fill levels differ."""
    runs: list[list[tuple[int, Op]]] = []
    for position, op in enumerate(ops):
        if isinstance(op, PadCrop | Flip) and runs and isinstance(runs[-1][0][1], PadCrop | Flip):
            levels = {step.fill for _, step in [*runs[-1], (position, op)] if isinstance(step, PadCrop)} - {"reflect"}
            if len(levels) < 2:
                runs[-1].append((position, op))
                continue
        runs.append([(position, op)])
    return runs


def _widest(ops: tuple[Op, ...], size: tuple[int, int]) -> int:
    """The number of elements per sample of the largest temporary."""
    height, width = size
    for op in ops:
        size = op.output_size(size)
        height, width = max(height, size[0]), max(width, size[1])
    return 3 * height * width


def _each(work: Callable[[int], None], starts: Sequence[int], device: torch.device) -> None:
    """Call `work` for every sub-batch; on the CPU in threads that use one torch thread each.

    Torch would split every small operation and wait for the slower half. On cores that are busy with training or with
    other processes, that wait costs many times the work.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(starts) < 2:
        for start in starts:
            work(start)
    else:
        list(_workers(threads).map(work, starts))


@functools.cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """A permanent pool: a worker that sets its own torch thread count also changes the default of new threads.

    So all workers start here, and the default is restored before anything else can start a thread with it.
    """
    pool = ThreadPoolExecutor(threads, "views", initializer=torch.set_num_threads, initargs=(1,))
    started = threading.Barrier(threads)
    list(pool.map(lambda _: started.wait(), range(threads)))
    torch.set_num_threads(threads)
    return pool


os.register_at_fork(after_in_child=_workers.cache_clear)  # a forked process has the pool but not its threads


def _on_device(drawn: Mapping[str, Integers], ops: int, device: torch.device) -> list[dict[str, Tensor]]:
    """The parameters of each op by name, copied to the device in one transfer that does not block."""
    parameters: list[dict[str, Tensor]] = [{} for _ in range(ops)]
    if drawn:
        table = torch.from_numpy(np.stack(list(drawn.values())))
        table = table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)
        for key, values in zip(drawn, table, strict=True):
            position, _, name = key.split(".")
            parameters[int(position)][name] = values
    return parameters


def _shifted(places_NL: Tensor, offset_N: Tensor, reflect: bool) -> Tensor:
    """The map `places` read at l + offset. Beyond its ends it is mirrored, or L, which means the fill level."""
    length = places_NL.shape[1]
    at = torch.arange(length, device=places_NL.device) + offset_N[:, None]
    if reflect:
        last = length - 1
        return places_NL.gather(1, last - (last - at.abs()).abs())
    within = at.clamp(0, length - 1)
    return torch.where(at == within, places_NL.gather(1, within), length)


def _inside(start_N: Tensor, length_N: Tensor, size: int) -> Tensor:
    """bool [N, size]: start ≤ place < start + length."""
    place = torch.arange(size, device=start_N.device)
    return (place >= start_N[:, None]) & (place < (start_N + length_N)[:, None])


@functools.cache
def _hue_table(device: torch.device) -> Tensor:
    """int32 [3, 1024]: weights of a channel, the following and the previous one, for turns of k/1024, in 1/65536.

    Rows of the rotation matrix about (1, 1, 1): ⅓ + ⅔ cos θ and ⅓ (1 − cos θ) ∓ sin θ / √3. They add up to 65536
    exactly, so greys do not change. No entry lies within 10⁻⁶ of a rounding boundary (a test checks this), and
    mathematics libraries differ by far less.
    """
    table = torch.empty(3, HUE_STEPS, dtype=torch.int32)
    for step in range(HUE_STEPS):
        following, previous = (round(value) for value in hue_weights(step))
        table[:, step] = torch.tensor([ONE - following - previous, following, previous])
    return table.to(device)


def _to_grey_level(fixed: Tensor) -> Tensor:
    """Round numbers with 16 fraction bits to the nearest whole number (halves up) in 0 … 255, in place."""
    return fixed.add_(1 << COLOUR_BITS - 1).bitwise_right_shift_(COLOUR_BITS).clamp_(0, 255)


def _resample_rows(images_NCHW: Tensor, start_N: Tensor, length_N: Tensor, size: int) -> Tensor:
    """Resample rows start … start + length − 1 of each image to `size` rows: uint8 [N, C, size, W].

    The sum over the few rows with a weight is exact in int32 (255 · 2¹⁵ < 2²³) for all matmul settings. For images
    larger than about 32 pixels it is faster than a dense matmul.
    """
    count, channels, height, width = images_NCHW.shape
    place, weights = triangle_taps(length_N, height, size)
    flat = images_NCHW.reshape(-1, width)
    first_row = torch.arange(0, len(flat), height, device=flat.device).view(count, channels, 1) + start_N.view(-1, 1, 1)
    total = torch.full((count, channels, size, width), 1 << WEIGHT_BITS - 1, dtype=torch.int32, device=flat.device)
    for tap in range(weights.shape[2]):
        rows = flat.index_select(0, (first_row + place[:, None, :, tap]).view(-1))
        total.addcmul_(rows.view_as(total).to(torch.int32), weights[:, None, :, tap, None])
    return total.bitwise_right_shift_(WEIGHT_BITS).to(torch.uint8)
