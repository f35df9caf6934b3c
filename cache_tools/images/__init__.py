"""Open image sources: whole splits and parts of them.

Every source gives RGB uint8 NCHW on a canvas of one size. `sources.py` lists them: `arrays.py` has those that fit in
memory (digits, Fashion-MNIST, CIFAR), `folder.py` has folders, `listed.py` lists of files, `hf.py` Hugging Face data
sets. Opening imports no torch, torchvision, scikit-learn or PIL.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING

from cache_tools.errors import DataError, RecipeError
from cache_tools.images.recipe import DatasetIdentity, DatasetRecipe
from cache_tools.images.sources import find_source
from cache_tools.lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt

    from cache_tools.images.image_set import ImageSet

# `train[:20000]`, `train[50%:]`, `train[::5]`
_END = r"(?:-?[0-9]+|[0-9]+(?:[.][0-9]+)?%)?"
_PART = re.compile(rf"(?P<split>[^\[\]]+)\[(?P<start>{_END}):(?P<stop>{_END})(?::(?P<step>[1-9][0-9]*)?)?\]")


def open_images(recipe: DatasetRecipe, split: str | None = None) -> ImageSet:
    """Open a split or a part of one. A folder's files are read for their keys, but not decoded.

    With `on_bad_image: skip` the images of a folder are decoded once, unless that was done before, and those that
    cannot be decoded are left out: a part is a part of the others.

    Args:
        split: None for `recipe.split`.

    Raises:
        DataError: there is no such split, the part is empty, or a class has no image.
        RecipeError: a cache's `recipe.dataset`, which identifies images and does not say where they are.
    """
    given: object = recipe
    if isinstance(given, DatasetIdentity):
        raise RecipeError(
            "the identity of a dataset does not say where its images are",
            where="open_images",
            expected="a DatasetRecipe, such as cache.manifest.dataset",
            found="the DatasetIdentity of a cache's recipe",
        )
    wanted = split or recipe.split
    images = _open_split(recipe, whole_split(wanted))
    if recipe.on_bad_image == "skip":
        from cache_tools.images.check import without_damaged

        images = without_damaged(images)
    return images if whole_split(wanted) == wanted else images.subset(_slice(wanted, len(images)), wanted)


def whole_split(split: str) -> str:
    """The name of the split that a part belongs to: `train` of `train[::5]`; other names are returned unchanged."""
    match = _PART.fullmatch(split)
    return split if match is None else match["split"]


def part_rows(split: str, count: int) -> npt.NDArray[np.int64]:
    """The rows of a part in its whole split of `count` samples, int64, ascending; all of them for a whole split.

    Raises:
        DataError: the part is empty.
    """
    return np.arange(count, dtype=np.int64)[_slice(split, count)]


def _open_split(recipe: DatasetRecipe, split: str) -> ImageSet:
    module, _, function = find_source(recipe.name).opener.partition(":")
    opened: ImageSet = getattr(import_module(module), function)(recipe, split)
    return opened


def _slice(split: str, count: int) -> slice:
    """The samples of a part of a split of `count` samples."""
    match = _PART.fullmatch(split)
    if match is None:
        return slice(None)
    start, stop = (_bound(match[end], count) for end in ("start", "stop"))
    part = slice(start, stop, int(match["step"]) if match["step"] else None)
    if not len(range(count)[part]):
        raise DataError("that part of the split is empty", where=split, found=f"{count} samples in all")
    return part


def _bound(text: str, count: int) -> int | None:
    """One end of a slice over `count` samples, from nothing, a number, or a percentage of them."""
    if not text:
        return None
    return int(count * float(text[:-1]) / 100) if text.endswith("%") else int(text)
