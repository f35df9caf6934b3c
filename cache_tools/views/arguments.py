"""The arguments of views, checked: sample indices, the number of a view, the sizes of pictures."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from cache_tools.errors import DataError, RecipeError
from cache_tools.lazy import np
from cache_tools.views.ops import MAX_SIDE, Integers, Size

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import torch

    Index: TypeAlias = int | range | Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor

MAX_PICTURE_SIDE, MAX_PICTURE_AREA = 1 << 16, 1 << 28  # of version 2: its areas have 12 fraction bits


def one_size(image_size: Size | Integers) -> Size:
    """The (height, width) that all images have."""
    sizes = np.asarray(image_size)
    if sizes.ndim == 2:
        if len(sizes) and (sizes != sizes[0]).any():
            raise RecipeError(
                "pictures of several sizes need views of version 2 that start with a crop",
                where="views.ops",
                expected="random-resized-crop or resize-centre-crop first",
                found=f"pictures of {sizes[0][0]}×{sizes[0][1]} and other sizes",
            )
        sizes = sizes[0] if len(sizes) else np.array([1, 1])
    height, width = (int(side) for side in sizes)
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise RecipeError(
            "images of this size cannot be augmented",
            expected=f"sides of 1 to {MAX_SIDE}",
            found=f"{height}×{width}",
        )
    return height, width


def picture_sizes(image_size: Size | Integers, count: int) -> Integers:
    """The (height, width) of each picture, int64 [count, 2]."""
    sizes = np.asarray(image_size, dtype=np.int64)
    if sizes.ndim == 1:
        sizes = np.broadcast_to(sizes, (count, 2))
    if sizes.shape != (count, 2):
        raise DataError("one size for each picture", expected=f"[{count}, 2]", found=list(sizes.shape))
    wrong = (sizes < 1).any(axis=1) | (sizes > MAX_PICTURE_SIDE).any(axis=1) | (sizes.prod(axis=1) > MAX_PICTURE_AREA)
    if wrong.any():
        height, width = sizes[int(np.argmax(wrong))]
        raise RecipeError(
            "pictures of this size cannot be augmented",
            expected=f"sides of 1 to {MAX_PICTURE_SIDE} and at most {MAX_PICTURE_AREA:,} pixels",
            found=f"{height}×{width}",
        )
    return sizes


def sample_index(index: Index) -> Integers:
    """Convert any kind of index to int64 [N]."""
    try:
        array: npt.NDArray[Any] = np.asarray(index.cpu() if _is_tensor(index) else index)
    except (ValueError, OverflowError) as error:
        raise DataError("cannot read sample indices", expected="whole numbers", found=type(index).__name__) from error
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim == 0:
        array = array.reshape(1)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            "cannot read sample indices",
            expected="one row of whole numbers",
            found=f"{array.dtype} {list(array.shape)}",
        )
    if array.size and (int(array.min()) < 0 or int(array.max()) >= 1 << 63):
        wrong = int(array.min()) if int(array.min()) < 0 else int(array.max())
        raise DataError("sample index out of range", expected="0 … 2^63−1", found=wrong)
    return array.astype(np.int64, copy=False)


def _is_tensor(index: Index) -> TypeGuard[torch.Tensor]:
    """Does not import torch: a caller that holds a tensor has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(index, torch.Tensor)


def view_number(view: int) -> int:
    try:
        number = view.__index__()
    except AttributeError:
        raise DataError("a view is a whole number", expected="0 … 2^32−1", found=repr(view)) from None
    if not 0 <= number < 1 << 32:
        raise DataError("view out of range", expected="0 … 2^32−1", found=number)
    return number
