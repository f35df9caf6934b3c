"""Images that a function of one's own opens: `package.module:function` as the name of a data set.

The function gets the recipe and the split, and returns `(images, labels, class_names)` or an `ImageSet`. The images are
paths, relative to `data_dir` or absolute, or an array of pixels: uint8 [N, H, W, 3]. Labels are places in the names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cache_tools.errors import CacheError, DataError
from cache_tools.images.arrays import array_images
from cache_tools.images.class_names import listed
from cache_tools.images.image_set import ImageSet
from cache_tools.images.listed import listed_images
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.system import own_code
from cache_tools.system.arguments import expand_user

_PURPOSE = own_code.Purpose("source of images", "", "a function (recipe, split) that returns images")
_EXPECTED = "(images, labels, class_names): paths or pixels uint8 [N, H, W, 3], numbers, names; or an ImageSet"


def open_own(recipe: DatasetRecipe, split: str) -> ImageSet:
    """Import the module, call the function and check what it returns.

    Only for a recipe of the user's: `as_received` refuses the name in a received file.

    Raises:
        RecipeError: no such module or function.
        DataError: the function fails, or returns something else.
    """
    function = own_code.find_function(recipe.name, _PURPOSE)
    own_code.remember(recipe.name)
    try:
        found = function(recipe.absolute(), split)  # whose paths below data_dir are then found from any folder
    except CacheError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise DataError(
            "the function that opens the images failed",
            where=f"{recipe.name}, {own_code.place_of(error)}",
            found=own_code.first_line(error),
        ) from error
    if isinstance(found, ImageSet):
        return replace(found, name=recipe.name, split=split)
    if not isinstance(found, tuple) or len(found) != 3:
        raise _wrong(recipe, type(found).__name__)
    images, labels, names = found
    class_names = tuple(names)
    numbers = np.asarray(labels)
    if not class_names or not all(isinstance(name, str) and name for name in class_names):
        raise _wrong(recipe, "names of classes that are no text")
    if len(set(class_names)) < len(class_names):
        raise _wrong(recipe, f"a class twice: {listed(sorted(class_names))}")
    if not len(images):
        raise _wrong(recipe, f"no image of the split {split}")
    if numbers.shape != (len(images),) or numbers.dtype.kind not in "iu":
        raise _wrong(recipe, f"{len(images):,} images, labels {numbers.dtype} {list(numbers.shape)}")
    if not 0 <= numbers.min() <= numbers.max() < len(class_names):
        raise _wrong(recipe, f"labels from {numbers.min()} to {numbers.max()} for {len(class_names)} classes")
    numbers = numbers.astype(np.int64)
    if isinstance(images, np.ndarray) and images.dtype != object and images.dtype.kind not in "US":
        return _pixels(recipe, split, images, numbers, class_names)
    return _files(recipe, split, images, numbers, class_names)


def _pixels(
    recipe: DatasetRecipe, split: str, images: Any, labels: np.ndarray, class_names: tuple[str, ...]
) -> ImageSet:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise _wrong(recipe, f"an array {images.dtype} {list(images.shape)}")
    return array_images(recipe, split, class_names, labels, images, images.transpose(0, 3, 1, 2))


def _files(
    recipe: DatasetRecipe, split: str, images: Sequence[Any], labels: np.ndarray, class_names: tuple[str, ...]
) -> ImageSet:
    if bad := [each for each in images if not isinstance(each, str | Path)]:
        raise _wrong(recipe, f"a list of {type(bad[0]).__name__}")
    root = Path.cwd() if recipe.data_dir is None else expand_user(recipe.data_dir)
    paths = [str(each) for each in images]
    return listed_images(recipe, split, root, paths, class_names, labels, list_name=f"{recipe.name} {split}")


def _wrong(recipe: DatasetRecipe, found: str) -> DataError:
    return DataError(
        "the function that opens the images returns something else", where=recipe.name, expected=_EXPECTED, found=found
    )
