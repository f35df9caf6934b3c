"""How a student sees test images: at the size of the views that it was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cache_tools.format.recipe import Preprocessing

if TYPE_CHECKING:
    import torch

MIN_CROP = 7 / 8  # 224 of 256, as is usual on ImageNet

Size = tuple[int, int]
Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]


def evaluation_preprocessing(
    view_size: Size, canvas_size: Size, normalisation: Normalisation, crop: float | None = None
) -> Preprocessing:
    """The preprocessing of test images on a canvas, for a student that was trained on views of another size.

    A view that is a little smaller than the canvas is the centre of the canvas. The crop keeps at least 7/8 of the
    shorter side: from a larger canvas the image is first resized. A larger view is the resized canvas. Where both
    sizes are the same, images stay as they are.

    Args:
        view_size, canvas_size: (height, width) in pixels.
        crop: the part of the resized image that the crop keeps, where it is recorded; None to follow the rule.
    """
    mean, std = normalisation
    if tuple(view_size) == tuple(canvas_size):
        return Preprocessing(mean=mean, std=std)
    if crop is None:
        crop = crop_fraction(view_size, canvas_size)
    return Preprocessing(size=view_size, crop=crop, mean=mean, std=std)


def as_tested(pixels_NCHW: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Test images uint8 [B, 3, h, w] as a student of this preprocessing sees them, for networks with another one.

    Teachers and CLIP are measured on these, so that their figures and the student's are about the same pixels.
    """
    import torch

    from cache_tools.preprocess import resize_and_crop

    return resize_and_crop(pixels_NCHW, preprocessing).to(torch.uint8)  # whole grey levels already


def crop_fraction(view_size: Size, canvas_size: Size) -> float:
    """The part of the resized image that the centre crop keeps: 7/8 to 1."""
    return min(1.0, max(MIN_CROP, *(view / canvas for view, canvas in zip(view_size, canvas_size, strict=True))))
