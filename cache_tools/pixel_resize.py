"""Crop and resize uint8 images with integer weights: the same on every device and library version."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

WEIGHT_BITS = 15


def crop_and_resize(images_NCHW: Tensor, values: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Each image's box (`top`, `left`, `height`, `width`), resized to `size`: rows first, uint8 between the passes."""
    pixels = _resample_rows(images_NCHW, values["top"], values["height"], size[0])
    pixels = _resample_rows(pixels.transpose(2, 3).contiguous(), values["left"], values["width"], size[1])
    return pixels.transpose(2, 3)


def triangle_taps(length_N: Tensor, source: int, size: int) -> tuple[Tensor, Tensor]:
    """Where each output row looks, and how much: a triangle filter, widened when it shrinks (antialiased bilinear).

    Output row i of `size` has its centre at (i + ½)·length/size; source row j weighs 1 − |j + ½ − centre| / w with
    w = max(1, length/size), if that is positive and j inside the box. Everything is multiplied by 2·max(length, size)
    to be whole, then scaled to add up to 2¹⁵ exactly: rounded down, the rest to the (first) largest.

    Args:
        length_N: int64 [N], rows of each box.
        source: rows of the image, an upper bound of every length.
        size: rows wanted.

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
    rank = raw * count - order  # distinct, so that exactly one is the largest
    rest = (1 << WEIGHT_BITS) - weights.sum(2, keepdim=True)
    weights = torch.where(rank == rank.amax(2, keepdim=True), weights + rest, weights)
    return torch.minimum(place.clamp(min=0), length - 1), weights.to(torch.int32)


def _resample_rows(images_NCHW: Tensor, start_N: Tensor, length_N: Tensor, size: int) -> Tensor:
    """uint8 [N, C, size, W]: rows start … start + length − 1 of each image resampled to `size` rows.

    A sum over the few rows that weigh something, element by element: exact in int32 (255 · 2¹⁵ < 2²³) whatever the
    matmul settings are, and where images are larger than about 32 pixels, faster than a dense matmul.
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
