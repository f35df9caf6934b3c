"""Boxes of pictures at the size of a view, in one antialiased step: uint8 in, uint8 out, in integer arithmetic.

Columns come first, then rows, with bytes between the two, as PIL and torchvision resample. A picture gives the same
bytes alone and in a batch of pictures of its size. A change of any result needs a new version of ViewRecipe.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cache_tools.views.boxes import Interpolation
from cache_tools.views.ops import Integers

WEIGHT_BITS = 15
SUM_BITS = 46  # of the sum of an output's weights, before they are scaled
EXACT_SIDE = 1 << 14  # up to here, cubes of sides fit into 63 bits


def crop_picture(
    picture_HW3: Tensor, box: tuple[int, int, int, int], size: tuple[int, int], how: Interpolation
) -> Tensor:
    """The box (top, left, height, width) of one picture, uint8 [H, W, 3], resized to `size`: uint8 [3, h, w]."""
    top, left, height, width = box
    lines = picture_HW3.numpy().reshape(picture_HW3.shape[0], -1)[top : top + height, 3 * left : 3 * (left + width)]
    columns = torch.from_numpy(np.ascontiguousarray(lines.T))  # several times faster than torch's transpose
    place, weights = _taps(width, size[1], how)
    every_channel = (3 * place[:, None] + torch.arange(3)[:, None]).view(-1, place.shape[1])
    columns = _resample(columns, every_channel, weights.repeat_interleave(3, 0))
    rows = torch.from_numpy(np.ascontiguousarray(columns.numpy().T))
    return _resample(rows, *_taps(height, size[0], how)).view(size[0], size[1], 3).permute(2, 0, 1)


def crop_batch(images_NCHW: Tensor, boxes: Mapping[str, Integers], size: tuple[int, int], how: Interpolation) -> Tensor:
    """The box of each image of a batch, resized to `size`: uint8 [N, 3, h, w] on the same device."""
    columns = images_NCHW.transpose(2, 3).contiguous()
    columns = _resample_batch(columns, boxes["left"], boxes["width"], size[1], how)
    rows = columns.transpose(2, 3).contiguous()
    return _resample_batch(rows, boxes["top"], boxes["height"], size[0], how)


def filter_weights(length: int, size: int, how: Interpolation) -> tuple[Integers, Integers]:
    """The source places of each output place and their weights, for an axis resized from `length` to `size`.

    A triangle (bilinear) or PIL's cubic filter (bicubic, a = −½), widened for shrinking. Output i has its centre at
    (i + ½) · length / size; source j weighs f(|j + ½ − centre| / max(1, length / size)) if it is inside. The running
    sums are rounded to 2⁻¹⁵, so that the weights add up to one and none is off by more than 2⁻¹⁵.

    Returns:
        places int64 [size, K] in 0 … length − 1, and weights int64 [size, K].
    """
    unit = 2 * max(length, size)  # distances are in 1 / unit of the filter's scale
    reach = unit if how == "bilinear" else 2 * unit
    centre = (2 * np.arange(size, dtype=np.int64) + 1) * length
    first = (centre - reach - size) // (2 * size) + 1
    count = -(-reach // size)  # whole numbers in an open interval of length reach / size
    place = first[:, None] + np.arange(count, dtype=np.int64)
    distance = np.abs((2 * place + 1) * size - centre[:, None])
    if max(length, size) > EXACT_SIDE:
        distance = distance.astype(object)
    raw = _triangle(distance, unit) if how == "bilinear" else _cubic(distance, unit)
    raw = np.where((place >= 0) & (place < length), raw, 0)
    spare = max(0, int(raw.sum(axis=1).max()).bit_length() - SUM_BITS)
    sums = (raw >> spare).astype(np.int64).cumsum(axis=1)
    rounded = ((sums << WEIGHT_BITS + 1) + sums[:, -1:]) // (2 * sums[:, -1:])
    weights = np.diff(rounded, axis=1, prepend=0)
    return np.clip(place, 0, length - 1), weights


def _triangle(distance: Integers, unit: int) -> Integers:
    return np.maximum(unit - distance, 0)


def _cubic(distance: Integers, unit: int) -> Integers:
    """2 · unit³ · f(distance / unit), with f(t) = 1.5t³ − 2.5t² + 1 below 1 and −0.5t³ + 2.5t² − 4t + 2 below 2."""
    d, u = distance, unit
    near = (3 * d - 5 * u) * d * d + 2 * u * u * u
    far = ((5 * u - d) * d - 8 * u * u) * d + 4 * u * u * u
    return np.where(d < u, near, np.where(d < 2 * u, far, 0))


@functools.lru_cache(maxsize=1 << 10)
def _taps(length: int, size: int, how: Interpolation) -> tuple[Tensor, Tensor]:
    """`filter_weights` as tensors on the CPU: places int64 [size, K] and weights float32 [size, K]."""
    place, weights = filter_weights(length, size, how)
    return torch.from_numpy(place), torch.from_numpy(weights.astype(np.float32))


def _resample(lines: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of uint8 lines [L, M] at `place` [size, K]: uint8 [size, M].

    Products and sums are whole numbers below 2²⁴, which float32 holds exactly in any order and on any device.
    """
    total = F.embedding_bag(place, lines.to(torch.float32), per_sample_weights=weights, mode="sum").to(torch.int32)
    half = 1 << WEIGHT_BITS - 1
    return total.add_(half).bitwise_right_shift_(WEIGHT_BITS).clamp_(0, 255).to(torch.uint8)


def _resample_batch(images_NCHW: Tensor, start: Integers, length: Integers, size: int, how: Interpolation) -> Tensor:
    """Resample rows start … start + length − 1 of each image to `size` rows: uint8 [N, C, size, W]."""
    count, channels, height, width = images_NCHW.shape
    device = images_NCHW.device
    tables = [_taps(each, size, how) for each in length.tolist()]
    taps = max((place.shape[1] for place, _ in tables), default=0)
    place = torch.zeros(count, 1, size, taps, dtype=torch.int64)
    weights = torch.zeros(count, 1, size, taps, dtype=torch.float32)
    for row, (some, of_them) in enumerate(tables):
        place[row, 0, :, : some.shape[1]], weights[row, 0, :, : some.shape[1]] = some + int(start[row]), of_them
    first_row = torch.arange(0, count * channels * height, height, device=device).view(count, channels, 1, 1)
    places = (place.to(device) + first_row).view(-1, taps)
    of_each = weights.to(device).expand(-1, channels, -1, -1).reshape(-1, taps)
    return _resample(images_NCHW.reshape(-1, width), places, of_each).view(count, channels, size, width)
