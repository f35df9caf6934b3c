"""A view is a function, not a file: (recipe, base seed, view, sample) → integer parameters → pixels.

Counter-based random numbers and integer arithmetic give the same result on every machine, device and library version.
So a cache stores targets only, and training recomputes the teacher's pixels bit for bit. Only `apply` needs torch.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeGuard

from pydantic import Field

from cache_tools.config import Frozen
from cache_tools.errors import DataError, RecipeError
from cache_tools.lazy import np
from cache_tools.philox import sample_words
from cache_tools.views.ops import MAX_SIDE, Integers, Size, ViewOp, Words

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import torch

    Index: TypeAlias = int | range | Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor

MAX_OPS = 64
DRAW_BITS = 8


class ViewRecipe(Frozen):
    """How a view is made from a sample and the augmentation seed `view`.

    Attributes:
        version: of the drawing rules and the pixel arithmetic; a change of either is a new version.
        base_seed: the Philox key.
        clean_first: whether view 0 is the clean image: every op gets its neutral parameters, and a random resized crop
            resizes the whole image.
        ops: applied in this order. The op at position p takes its k-th four words from the counter (sample index low,
            sample index high, view, p · 256 + k).
    """

    version: Literal[1] = 1
    base_seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 0
    clean_first: bool = False
    ops: Annotated[tuple[ViewOp, ...], Field(max_length=MAX_OPS)] = ()

    def output_size(self, image_size: Size) -> Size:
        """(height, width) of a view of images of `image_size`.

        Raises:
            RecipeError: an op cannot work on images of this size.
        """
        for op in self.ops:
            image_size = op.output_size(image_size)
        return image_size

    def parameters(self, index: Index, view: int, image_size: Size) -> dict[str, Integers]:
        """All random parameters of a view: `POSITION.OP.NAME` → int64 [N], in the order of `index`.

        Args:
            index: sample indices, 0 … 2⁶³−1, in any order; or a single index.
            view: 0 … 2³²−1.
            image_size: (height, width) of the source images.

        Raises:
            DataError: an index or the view is negative or not a whole number.
            RecipeError: an op cannot work on images of this size.
        """
        samples = _sample_index(index)
        number = _view_number(view)
        height, width = (int(side) for side in image_size)
        if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
            raise RecipeError(
                "images of this size cannot be augmented",
                expected=f"sides of 1 to {MAX_SIDE}",
                found=f"{height}×{width}",
            )
        size = (height, width)
        drawn: dict[str, Integers] = {}
        for position, op in enumerate(self.ops):
            following = op.output_size(size)
            if self.clean_first and number == 0:
                values = op.neutral(len(samples), size)
            else:
                values = op.draw(self._words(samples, number, position), size)
            drawn |= {f"{position}.{op.op}.{name}": value for name, value in values.items()}
            size = following
        return drawn

    def parameter_digest(self, index: Index, view: int, image_size: Size) -> int:
        """The digest of a block's parameters that a cache stores: 64 bits of blake2b, never 0.

        It covers the version, the view, the image size, the sample indices, and the name and values of each parameter.
        """
        samples = _sample_index(index)
        drawn = self.parameters(samples, view, image_size)
        header = [self.version, _view_number(view), *(int(side) for side in image_size), len(samples), list(drawn)]
        digest = hashlib.blake2b(json.dumps(header, separators=(",", ":")).encode(), digest_size=8)
        for values in (samples, *drawn.values()):
            digest.update(np.ascontiguousarray(values, dtype="<i8").data)
        return int.from_bytes(digest.digest(), "little") or 1

    def apply(self, images_NCHW_u8: torch.Tensor, index: Index, view: int) -> torch.Tensor:
        """The pixels of a view, exactly as the teachers saw them.

        Args:
            images_NCHW_u8: uint8 [N, 3, H, W]; row i is sample `index[i]`. Any device.
            index: N sample indices, in any order.
            view: the augmentation seed.

        Returns:
            uint8 [N, 3, *output_size] on the same device; never shares memory with the input.

        Raises:
            DataError: the dtype or shape is wrong, or there are not as many images as indices.
            RecipeError: an op cannot work on images of this size.
        """
        from cache_tools.views import pixels

        samples = _sample_index(index)
        pixels.check(images_NCHW_u8, len(samples))
        size = (images_NCHW_u8.shape[2], images_NCHW_u8.shape[3])
        return pixels.apply(self.ops, self.parameters(samples, view, size), self.output_size(size), images_NCHW_u8)

    def _words(self, samples: Integers, view: int, position: int) -> Words:
        index = samples.astype(np.uint64)
        return lambda draw: sample_words(self.base_seed, index, view, position << DRAW_BITS | draw)


def _sample_index(index: Index) -> Integers:
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


def _view_number(view: int) -> int:
    try:
        number = view.__index__()
    except AttributeError:
        raise DataError("a view is a whole number", expected="0 … 2^32−1", found=repr(view)) from None
    if not 0 <= number < 1 << 32:
        raise DataError("view out of range", expected="0 … 2^32−1", found=number)
    return number
