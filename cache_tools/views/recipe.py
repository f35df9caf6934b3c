"""A view is a function, not a file: (recipe, base seed, view, sample) → integer parameters → pixels.

Counter-based random numbers and integer arithmetic give the same result on every machine, device and library version.
So a cache stores targets only, and training recomputes the teacher's pixels bit for bit. Only `apply` needs torch.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, TypeAlias, TypeGuard

from pydantic import BaseModel, BeforeValidator, Field, PrivateAttr, model_validator

from cache_tools.config import Extensible, Frozen
from cache_tools.config.fields import Whole
from cache_tools.errors import DataError, RecipeError
from cache_tools.lazy import np
from cache_tools.philox import sample_words
from cache_tools.views.augment import RandAugment, Rotation, ThreeAugment, TrivialAugmentWide
from cache_tools.views.boxes import BoxOp, RandomResizedCrop, ResizeCentreCrop, evaluation_resize
from cache_tools.views.ops import (
    MAX_SIDE,
    ColourJitter,
    Flip,
    Identity,
    Integers,
    PadCrop,
    RandomErasing,
    Side,
    Size,
    Words,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import torch

    Index: TypeAlias = int | range | Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor

MAX_OPS = 64
DRAW_BITS = 8
PICTURES_AT_ONCE = 32  # decoded and in memory
MAX_PICTURE_SIDE, MAX_PICTURE_AREA = 1 << 16, 1 << 28  # of version 2: its areas have 12 fraction bits


def _op_of_name(op: Any) -> Any:
    """Accept `flip` for `{op: flip}`: in YAML an op without options may be its name alone."""
    return {"op": op} if isinstance(op, str) else op


ViewOp = Annotated[
    Annotated[
        Identity
        | PadCrop
        | Flip
        | ColourJitter
        | RandomResizedCrop
        | ResizeCentreCrop
        | RandAugment
        | TrivialAugmentWide
        | ThreeAugment
        | Rotation
        | RandomErasing,
        Field(discriminator="op"),
    ],
    BeforeValidator(_op_of_name),
]
# The ops that only version 2 has.
_SECOND = (ResizeCentreCrop, RandAugment, TrivialAugmentWide, ThreeAugment, Rotation)

Network = Literal["student", "teacher", "clip"]


class ViewSizes(Frozen):
    """The side of the square view that each network gets, of the same box; None for the size of the crop."""

    student: Side | None = None
    teacher: Side | None = None
    clip: Side | None = None


class Pictures(Protocol):
    """The part of an `ImageSet` that views are made of."""

    @property
    def resident(self) -> bool: ...

    def load(self, index: npt.NDArray[np.int64] | slice) -> npt.NDArray[np.uint8]: ...

    def pictures(self, index: npt.NDArray[np.int64] | slice) -> list[npt.NDArray[np.uint8]]: ...


class ViewRecipe(Extensible):
    """How a view is made from a sample and the augmentation seed `view`.

    In version 1 all images have one size: a canvas, to which pictures are resized and cropped before. In version 2 a
    crop may come first, which takes its box from the picture as it was decoded; without one, ops work on the canvas.

    Attributes:
        version: of the drawing rules and the pixel arithmetic; a change of either is a new version. By default 1, or 2
            with an op or a setting that version 1 does not have.
        base_seed: the Philox key.
        clean_first: whether view 0 is the clean image: every op gets its neutral parameters. A random resized crop
            resizes the whole image in version 1, and in version 2 the centre that students are tested on.
        ops: applied in this order. The op at position p takes its k-th four words from the counter (sample index low,
            sample index high, view, p · 256 + k).
        sizes: larger or smaller views of the same box for some networks, in version 2 with a crop.
    """

    added: ClassVar[frozenset[str]] = frozenset({"sizes"})

    version: Literal[1, 2] = 1
    base_seed: Annotated[Whole, Field(ge=0, lt=1 << 64)] = 0
    clean_first: bool = False
    ops: Annotated[tuple[ViewOp, ...], Field(max_length=MAX_OPS)] = ()
    sizes: ViewSizes = ViewSizes()

    _seen_at: Size | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _version_of_the_ops(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("version") is None and _needs_second(data):
            return data | {"version": 2}
        return data

    @model_validator(mode="after")
    def _ops_fit_the_version(self) -> ViewRecipe:
        for position, op in enumerate(self.ops):
            if self.version == 1 and _is_second(op):
                raise ValueError(f"{op.op} with these settings is for version 2 of the views, not for version 1")
            if self.version == 2 and position and isinstance(op, BoxOp):
                raise ValueError(f"{op.op} takes its box from the original picture, so it must be the first op")
            if self.sizes != ViewSizes() and isinstance(op, PadCrop):
                raise ValueError("sizes are for views of a crop and not for pad-crop, which moves by whole pixels")
        if self.sizes != ViewSizes() and self.box_op is None:
            raise ValueError("sizes need views of version 2 whose first op is a crop")
        return self

    @property
    def box_op(self) -> RandomResizedCrop | ResizeCentreCrop | None:
        """The crop of the original picture, the first op of version 2; None in version 1, or if there is none."""
        first = self.ops[0] if self.ops else None
        return first if self.version == 2 and isinstance(first, RandomResizedCrop | ResizeCentreCrop) else None

    def seen_by(self, network: Network) -> ViewRecipe:
        """The same views at the size that a network gets (`sizes`)."""
        side = getattr(self.sizes, network)
        views = self.model_copy()
        views._seen_at = None if side is None else (side, side)
        return views

    @property
    def canvas_side(self) -> int | None:
        """The canvas from whose centre test images are cut to the student's views; None without a crop of pictures."""
        box = self.box_op
        if box is None:
            return None
        return max(8, evaluation_resize(self.seen_by("student")._seen_at or box.view_size))

    def output_size(self, image_size: Size) -> Size:
        """(height, width) of a view of images of `image_size`.

        Raises:
            RecipeError: an op cannot work on images of this size.
        """
        for op in self.ops:
            image_size = op.output_size(image_size)
        return self._seen_at or image_size

    def parameters(self, index: Index, view: int, image_size: Size | Integers) -> dict[str, Integers]:
        """All random parameters of a view: `POSITION.OP.NAME` → int64 [N], in the order of `index`.

        Args:
            index: sample indices, 0 … 2⁶³−1, in any order; or a single index.
            view: 0 … 2³²−1.
            image_size: (height, width) of the source images. In version 2 also int [N, 2], the size of each picture.

        Raises:
            DataError: an index or the view is negative or not a whole number.
            RecipeError: an op cannot work on images of this size.
        """
        samples = _sample_index(index)
        number = _view_number(view)
        box = self.box_op
        if box is None:
            return self._draw(samples, number, _one_size(image_size))
        drawn = self._draw_boxes(samples, number, box, _picture_sizes(image_size, len(samples)))
        return {f"0.{box.op}.{name}": values for name, values in drawn.items()} | self._draw(samples, number, (0, 0))

    def parameter_digest(self, index: Index, view: int, image_size: Size) -> int:
        """The digest of a block's parameters that a cache stores: 64 bits of blake2b, never 0.

        It covers the version, the view, the image size, the sample indices, and the name and values of each parameter.
        In version 2 the boxes are those of pictures of the canvas size: a reader of a cache has no pictures.
        """
        samples = _sample_index(index)
        drawn = self.parameters(samples, view, image_size)
        header = [self.version, _view_number(view), *(int(side) for side in image_size), len(samples), list(drawn)]
        digest = hashlib.blake2b(json.dumps(header, separators=(",", ":")).encode(), digest_size=8)
        for values in (samples, *drawn.values()):
            digest.update(np.ascontiguousarray(values, dtype="<i8").data)
        return int.from_bytes(digest.digest(), "little") or 1

    def apply(self, images_NCHW_u8: torch.Tensor | Sequence[torch.Tensor], index: Index, view: int) -> torch.Tensor:
        """The pixels of a view, exactly as the teachers saw them.

        Args:
            images_NCHW_u8: uint8 [N, 3, H, W]; row i is sample `index[i]`. Any device. In version 2 with a crop, the
                decoded pictures; these may also be a list of N uint8 [3, H, W] on the CPU, each of its own size.
            index: N sample indices, in any order.
            view: the augmentation seed.

        Returns:
            uint8 [N, 3, *output_size] on the same device; never shares memory with the input.

        Raises:
            DataError: the dtype or shape is wrong, or there are not as many images as indices.
            RecipeError: an op cannot work on images of this size.
        """
        samples = _sample_index(index)
        return self.finish(self.crop(images_NCHW_u8, samples, view), samples, view)

    def load(self, images: Pictures, rows: npt.NDArray[np.int64] | slice, index: Index, view: int) -> torch.Tensor:
        """What `finish` needs of rows of an image set, on the CPU: their canvases, or the crops of their pictures.

        Args:
            index: the samples that the rows are.
        """
        return load_each(images, rows, index, view, [self])[0]

    def crop(self, images_NCHW_u8: torch.Tensor | Sequence[torch.Tensor], index: Index, view: int) -> torch.Tensor:
        """The first step of `apply`: the box of each picture at the size of the view. Without a crop, the images."""
        from cache_tools.views import pixels

        samples, box = _sample_index(index), self.box_op
        if box is None:
            pixels.check(images_NCHW_u8, len(samples))
            return images_NCHW_u8  # type: ignore[return-value]
        sizes = pixels.picture_sizes(images_NCHW_u8, len(samples))
        boxes = self._draw_boxes(samples, _view_number(view), box, _picture_sizes(sizes, len(samples)))
        return pixels.crop(images_NCHW_u8, boxes, self._seen_at or box.view_size, box.interpolation)

    def finish(self, cropped_NCHW_u8: torch.Tensor, index: Index, view: int) -> torch.Tensor:
        """The second step of `apply`: every op after the crop, on any device."""
        from cache_tools.views import pixels

        samples, box = _sample_index(index), self.box_op
        pixels.check(cropped_NCHW_u8, len(samples))
        size = (cropped_NCHW_u8.shape[2], cropped_NCHW_u8.shape[3])
        if box is None:
            drawn, ops, output = (
                self._draw(samples, _view_number(view), _one_size(size)),
                self.ops,
                self.output_size(size),
            )
            return pixels.apply(ops, drawn, output, cropped_NCHW_u8, self.version)
        drawn = self._draw(samples, _view_number(view), (0, 0), seen_at=size)
        return pixels.apply((Identity(), *self.ops[1:]), drawn, size, cropped_NCHW_u8, self.version)

    def _draw_boxes(self, samples: Integers, view: int, box: BoxOp, sizes: Integers) -> dict[str, Integers]:
        if self.clean_first and view == 0:
            return box.clean_boxes(sizes)
        return box.draw_boxes(self._words(samples, view, 0), sizes)

    def _draw(self, samples: Integers, view: int, size: Size, seen_at: Size | None = None) -> dict[str, Integers]:
        """The parameters of every op but the crop of version 2, by position and name.

        Args:
            size: of the images; of no account after a crop.
            seen_at: the size of the view, if it is another than the crop's.
        """
        drawn: dict[str, Integers] = {}
        for position, op in enumerate(self.ops):
            following = op.output_size(size)
            if op is not self.box_op:
                if self.clean_first and view == 0:
                    values = op.neutral(len(samples), size)
                else:
                    values = op.draw(self._words(samples, view, position), size)
                if seen_at is not None and seen_at != size:
                    values = op.rescaled(values, size, seen_at)
                drawn |= {f"{position}.{op.op}.{name}": value for name, value in values.items()}
            size = following
        return drawn

    def _words(self, samples: Integers, view: int, position: int) -> Words:
        index = samples.astype(np.uint64)
        return lambda draw: sample_words(self.base_seed, index, view, position << DRAW_BITS | draw)


def load_each(
    images: Pictures,
    rows: npt.NDArray[np.int64] | slice,
    index: Index,
    view: int,
    recipes: Sequence[ViewRecipe],
) -> list[torch.Tensor]:
    """`ViewRecipe.load` for one recipe as several networks see it; every picture is decoded once."""
    import torch

    if recipes[0].box_op is None or images.resident:
        pixels = torch.from_numpy(np.ascontiguousarray(images.load(rows)))
    samples = _sample_index(index)
    if recipes[0].box_op is None:
        return [pixels] * len(recipes)
    if images.resident:
        return [recipe.crop(pixels, samples, view) for recipe in recipes]
    chosen = np.arange(rows.start or 0, rows.stop) if isinstance(rows, slice) else rows
    parts: list[list[torch.Tensor]] = [[] for _ in recipes]
    for start in range(0, len(chosen), PICTURES_AT_ONCE):
        part = slice(start, start + PICTURES_AT_ONCE)
        pictures = [torch.from_numpy(picture) for picture in images.pictures(chosen[part])]
        for made, recipe in zip(parts, recipes, strict=True):
            made.append(recipe.crop(pictures, samples[part], view))
    return [torch.cat(made) for made in parts]


def _needs_second(data: dict[str, Any]) -> bool:
    """Whether a recipe as plain data uses what only version 2 has."""
    sizes = data.get("sizes")
    if isinstance(sizes, ViewSizes):
        sizes = sizes.model_dump()
    if isinstance(sizes, dict) and any(sizes.values()):
        return True
    ops = data.get("ops")
    names = {cls.model_fields["op"].default for cls in _SECOND}
    for op in ops if isinstance(ops, list | tuple) else ():
        if isinstance(op, BaseModel):
            if _is_second(op):
                return True
        elif isinstance(op, str):
            if op in names:
                return True
        elif isinstance(op, dict) and (op.get("op") in names or op.get("interpolation") == "bicubic"):
            return True
    return False


def _is_second(op: BaseModel) -> bool:
    return isinstance(op, _SECOND) or (isinstance(op, RandomResizedCrop) and op.interpolation != "bilinear")


def _one_size(image_size: Size | Integers) -> Size:
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


def _picture_sizes(image_size: Size | Integers, count: int) -> Integers:
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
