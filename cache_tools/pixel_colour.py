"""Colour jitter on uint8 images in fixed point: the same on every device and library version."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cache_tools.view_ops import HUE_STEPS, ONE, ColourJitter

COLOUR_BITS = 16
LUMA = (19_595, 38_470, 7_471)  # ITU-R 601 in 1/65536, adding up to 65536


def jitter(images_NCHW: Tensor, op: ColourJitter, values: Mapping[str, Tensor]) -> Tensor:
    """Brightness, contrast, saturation, hue, each rounded and clamped to 0 … 255.

    brightness x·f; contrast m + (x − m)·f for the image's rounded mean luma m; saturation l + (x − l)·f for the
    pixel's luma l; hue: RGB turned about the grey axis. A strength of 0 is an exact identity, so it is skipped.
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


def luma(pixels_NCHW: Tensor) -> Tensor:
    """int32 [N, 1, H, W]: (19595 R + 38470 G + 7471 B + 2¹⁵) / 2¹⁶, rounded down: 0 … 255."""
    red, green, blue = pixels_NCHW.split(1, dim=1)
    total = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    return total.add_(1 << COLOUR_BITS - 1).bitwise_right_shift_(COLOUR_BITS)


def hue_weights(step: int) -> tuple[float, float]:
    """Weights of the following and the previous channel for a turn of step/1024, times 65536, before rounding."""
    angle = 2 * math.pi * step / HUE_STEPS
    common, odd = (1 - math.cos(angle)) / 3, math.sin(angle) / math.sqrt(3)
    return (common - odd) * ONE, (common + odd) * ONE


@functools.cache
def _hue_table(device: torch.device) -> Tensor:
    """int32 [3, 1024]: weights of a channel, the following and the previous one, for turns of k/1024, in 1/65536.

    Rows of the rotation matrix about (1, 1, 1): ⅓ + ⅔ cos θ and ⅓ (1 − cos θ) ∓ sin θ / √3. They add up to 65536
    exactly, so greys stay. No entry lies within 10⁻⁶ of a rounding boundary (a test), far beyond what mathematics
    libraries differ by.
    """
    table = torch.empty(3, HUE_STEPS, dtype=torch.int32)
    for step in range(HUE_STEPS):
        following, previous = (round(value) for value in hue_weights(step))
        table[:, step] = torch.tensor([ONE - following - previous, following, previous])
    return table.to(device)


def _to_grey_level(fixed: Tensor) -> Tensor:
    """Fixed point with 16 fraction bits → the nearest whole number (halves up) in 0 … 255, in place."""
    return fixed.add_(1 << COLOUR_BITS - 1).bitwise_right_shift_(COLOUR_BITS).clamp_(0, 255)
