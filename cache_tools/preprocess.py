"""Turn the uint8 view canvas into the input of a network, on its device: resize, scale to [0, 1], normalise."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from cache_tools.format.recipe import Preprocessing


def prepare(
    pixels_NCHW: torch.Tensor, preprocessing: Preprocessing, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Turn the view canvas into the input of a network, as `Preprocessing` describes.

    A canvas of another size is resampled and its centre is cropped (`resize_and_crop`). Memory format (channels_last or
    not) and device are kept, and nothing synchronises.

    Args:
        pixels_NCHW: uint8 [B, 3, H, W].
        dtype: dtype of the result; the arithmetic is float32.

    Returns:
        [B, 3, h, w] on the same device: (pixels / 255 − mean) / std.
    """
    scale, shift = affine(preprocessing.mean, preprocessing.std, pixels_NCHW.device)
    pixels_NCHW = resize_and_crop(pixels_NCHW, preprocessing)
    if pixels_NCHW.is_cuda:  # one kernel reads the bytes and writes the floats
        return torch.addcmul(shift, pixels_NCHW, scale).to(dtype)
    # On the CPU two in-place passes are faster than addcmul and give the same bits with and without FMA units.
    return pixels_NCHW.float().mul_(scale).add_(shift).to(dtype)


@lru_cache(maxsize=64)
def affine(
    mean: tuple[float, float, float], std: tuple[float, float, float], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (scale, shift) [1, 3, 1, 1] on the device: pixels · scale + shift = (pixels / 255 − mean) / std."""
    with torch.inference_mode(False):  # tensors made in inference mode cannot be used in training later
        mean64, std64 = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (mean, std))
        return (1 / (255 * std64)).float().to(device), (-mean64 / std64).float().to(device)


def resize_and_crop(pixels_NCHW: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """The part of the canvas that a network sees, at the size of its input.

    The canvas is resampled, as PIL does for uint8 images, with antialias, until the centre crop keeps the part `crop`
    of its shorter side (relative to `size`). A canvas that has this size already is only cropped.

    Args:
        pixels_NCHW: uint8 [B, 3, H, W].

    Returns:
        [B, 3, h, w] in whole grey levels 0…255: uint8, or float32 where CUDA has resampled.
    """
    size, crop = preprocessing.size, preprocessing.crop
    height, width = pixels_NCHW.shape[2:]
    if size is None or (size == (height, width) and crop == 1.0):
        return pixels_NCHW
    ratio = max(size[0] / height, size[1] / width) / crop
    whole = (max(round(height * ratio), size[0]), max(round(width * ratio), size[1]))
    pixels = pixels_NCHW if whole == (height, width) else _resize(pixels_NCHW, whole, preprocessing.interpolation)
    top, left = round((whole[0] - size[0]) / 2), round((whole[1] - size[1]) / 2)
    return pixels[:, :, top : top + size[0], left : left + size[1]]


def _resize(pixels: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    if interpolation == "nearest":
        return F.interpolate(pixels, size, mode="nearest-exact")  # PIL's choice of pixel
    if pixels.is_cuda:
        return _resample_in_passes(pixels, size, interpolation)
    # PIL's integer arithmetic, several times faster than float32; not available on CUDA.
    return F.interpolate(pixels, size, mode=interpolation, align_corners=False, antialias=True)


def _resample_in_passes(pixels: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Resample as PIL does, in float32: the width, then the height, clamping and rounding to bytes after each.

    In a single pass, bicubic overshoot at hard edges would differ from PIL by up to 26 grey levels.
    """
    values = pixels.float()
    for whole in ((pixels.shape[2], size[1]), size):
        values = F.interpolate(values, whole, mode=interpolation, align_corners=False, antialias=True)
        values = values.clamp_(0, 255).round_()
    return values
