"""How a student sees test images: at the size of the views that it was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cache_tools.errors import RecipeError
from cache_tools.format.recipe import Preprocessing
from cache_tools.images.image_set import ImageSet, Interpolation
from cache_tools.views.recipe import Network, ViewRecipe
from train.recipe.evaluation import EvaluationRecipe

if TYPE_CHECKING:
    import torch

MIN_CROP = 7 / 8  # 224 of 256, as is usual on ImageNet

Size = tuple[int, int]
Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]


class ImagesInTest(NamedTuple):
    """Test images on a canvas, and the preprocessing with which they are taken from there."""

    images: ImageSet
    preprocessing: Preprocessing


def evaluation_preprocessing(
    view_size: Size,
    canvas_size: Size,
    normalisation: Normalisation,
    crop: float | None = None,
    interpolation: Interpolation = "bicubic",
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
    if tuple(view_size) == tuple(canvas_size) and crop in (None, 1.0):
        return Preprocessing(mean=mean, std=std)
    if crop is None:
        crop = crop_fraction(view_size, canvas_size)
    return Preprocessing(size=view_size, crop=crop, interpolation=interpolation, mean=mean, std=std)


def sizes_in_test(evaluation: EvaluationRecipe, views: ViewRecipe, canvas_size: Size) -> tuple[Size, int]:
    """The size that students are given in a test, and the length of the shorter side before the crop.

    Args:
        views: as the student sees them.
        canvas_size: of the training images.

    Raises:
        RecipeError: the crop is larger than the resized image.
    """
    size = evaluation.crop_size or views.output_size(canvas_size)
    if evaluation.resize is not None:
        resize = evaluation.resize
    elif views.box_op is not None and evaluation.crop is not None:
        resize = round(max(size) / MIN_CROP)
    else:
        resize = round(max(size) / crop_fraction(size, canvas_size))
    if max(size) > resize:
        raise RecipeError(
            "test images are resized to less than the student is given",
            where="evaluation.resize",
            expected=f"at least {max(size)}, the size of the views",
            found=resize,
            next_step="set evaluation.crop too",
        )
    return size, resize


def chosen_preprocessing(
    size: Size, resize: int, canvas_size: Size, normalisation: Normalisation, interpolation: Interpolation
) -> Preprocessing:
    """The preprocessing of test images on a canvas that is resized to `resize` and then cropped to `size`."""
    part = max(length / side for length, side in zip(size, canvas_size, strict=True)) * min(canvas_size) / resize
    return evaluation_preprocessing(size, canvas_size, normalisation, part, interpolation)


def network_tests(
    images: ImageSet, views: ViewRecipe, evaluation: EvaluationRecipe, normalisation: Normalisation
) -> tuple[ImagesInTest, ImagesInTest | None]:
    """What teachers and CLIP are measured on: the part of each image that students see, at each network's own size.

    Args:
        images: test images on the canvas of the training images.
        views: of which each network has its own size.

    Returns:
        The images for the teachers, and those for CLIP; None if these are the same.
    """
    networks: tuple[Network, Network] = ("teacher", "clip")
    teacher, clip = (_test_of(network, images, views, evaluation, normalisation) for network in networks)
    same = teacher.images.image_size == clip.images.image_size and teacher.preprocessing == clip.preprocessing
    return teacher, None if same else clip


def _test_of(
    network: Network, images: ImageSet, views: ViewRecipe, evaluation: EvaluationRecipe, normalisation: Normalisation
) -> ImagesInTest:
    canvas, for_student = images.image_size, views.seen_by("student")
    size, student_size = views.seen_by(network).output_size(canvas), for_student.output_size(canvas)
    if evaluation.is_default and size == student_size:
        return ImagesInTest(images, evaluation_preprocessing(size, canvas, normalisation))
    chosen, resize = sizes_in_test(evaluation, for_student, canvas)
    resize = round(max(size) * resize / max(chosen))
    images = images.at(resize, evaluation.interpolation)
    how = chosen_preprocessing(size, resize, images.image_size, normalisation, evaluation.interpolation)
    return ImagesInTest(images, how)


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
