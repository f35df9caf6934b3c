"""The ops that choose a box: which part of a picture a view shows, as whole pixels of the original picture.

In version 2 of a view recipe one of them comes first and takes the picture as it was decoded, at its own size. The box
is then resized to the size of the view in one step, so that nothing is blurred or lost by a canvas between the two.

Everything is integer arithmetic on fixed-point numbers, so boxes are the same on every machine. Ratios are powers of
2^(1/65536) from tables that integer square roots make exact; no exp, log or sin of a mathematics library is involved.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from cache_tools.config import Extensible
from cache_tools.lazy import np
from cache_tools.philox import WORD_BITS, below
from cache_tools.views.ops import Integers, Op, Ratio, Scale, Side, Size, Words, draw_box, integer_sqrt

if TYPE_CHECKING:
    import numpy.typing as npt

Interpolation = Literal["bilinear", "bicubic"]
ViewSize = Side | tuple[Side, Side]

TRIES = 10
EVALUATION_CROP = 7 / 8  # 224 of 256, as is usual on ImageNet

SCALE_BITS, AREA_BITS, RATIO_BITS = 24, 12, 16
EXPONENT_STEPS = 1 << 16  # aspect ratios per doubling
_TABLE_BITS = 30
_ROOT_BITS = 128


# What views need of a picture to be decoded at a part of its size: (height, width) of the largest view, the shorter
# side of the picture, the smallest share of its area that a box has, (lowest, highest) width / height of a random box,
# and width / height of a centred one.
Needs = tuple[int, int, int, float, tuple[float, float], float]


class BoxOp(Op):
    """The interface of an op that chooses a box: `top`, `left`, `height`, `width` in pixels of the picture.

    `sizes` are the (height, width) of each picture, int64 [N, 2].
    """

    @property
    def view_size(self) -> Size:
        """(height, width) of the views."""
        raise NotImplementedError

    def output_size(self, size: Size) -> Size:
        return self.view_size

    def needs(self, size: Size) -> Needs:
        """What a picture must have so that no box is smaller than `size`."""
        raise NotImplementedError

    def draw_boxes(self, words: Words, sizes: Integers) -> dict[str, Integers]:
        """The box of each picture; `words` as in `Op.draw`."""
        return self.clean_boxes(sizes)

    def clean_boxes(self, sizes: Integers) -> dict[str, Integers]:
        """The box of each picture in a clean view: the part that students are tested on."""
        return centre_boxes(sizes, self.view_size, evaluation_resize(self.view_size))


class RandomResizedCrop(BoxOp, Extensible):
    """Resize a box of random area and aspect ratio to `size`: `top`, `left`, `height`, `width`.

    `size` is the side of a square, or (height, width). Version 2 follows the rule of torchvision (`draw_boxes`);
    version 1 takes words 0 to 3 of one draw (`draw_box`), and its images all have one size.
    """

    added: ClassVar[frozenset[str]] = frozenset({"interpolation"})

    op: Literal["random-resized-crop"] = "random-resized-crop"
    size: ViewSize
    scale: Scale = (0.08, 1.0)
    ratio: Ratio = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"

    @property
    def view_size(self) -> Size:
        return _pair(self.size)

    def needs(self, size: Size) -> Needs:
        return *size, _shorter(size, self.view_size, None), self.scale[0], self.ratio, _shape(self.view_size)

    def draw(self, words: Words, size: Size) -> dict[str, Integers]:
        return draw_box(words(0), size, self.scale, self.ratio)

    def neutral(self, count: int, size: Size) -> dict[str, Integers]:
        zero = np.zeros(count, dtype=np.int64)
        return {"top": zero, "left": zero, "height": np.full(count, size[0]), "width": np.full(count, size[1])}

    def draw_boxes(self, words: Words, sizes: Integers) -> dict[str, Integers]:
        """Draw boxes by torchvision's rule: up to ten tries, then the largest centred box that the ratios allow.

        A try takes two words: the area, uniform over `scale`, and the ratio width / height, log-uniform over `ratio`.
        Tries 2k and 2k + 1 take the words of draw k; the position takes words 0 and 1 of draw 5.
        """
        heights, widths = sizes[:, 0], sizes[:, 1]
        lowest, highest = (heights * widths * round(end * (1 << SCALE_BITS)) >> AREA_BITS for end in self.scale)
        first, last = exponents(self.ratio)
        box_heights, box_widths = self._fallback(heights, widths)
        open_ = np.ones(len(sizes), dtype=bool)
        for attempt in range(TRIES):
            area_word, ratio_word = words(attempt // 2)[2 * (attempt % 2) : 2 * (attempt % 2) + 2]
            area = lowest + _wide_below(area_word, highest - lowest + 1)
            ratio = power_of_two(first + below(ratio_word, last - first + 1))
            tried_widths = (integer_sqrt(area * ratio >> AREA_BITS + RATIO_BITS - 2) + 1) >> 1  # rounded
            tried_heights = (integer_sqrt((area << RATIO_BITS + 2) // ratio >> AREA_BITS) + 1) >> 1
            fits = (tried_widths > 0) & (tried_widths <= widths) & (tried_heights > 0) & (tried_heights <= heights)
            box_heights = np.where(open_ & fits, tried_heights, box_heights)
            box_widths = np.where(open_ & fits, tried_widths, box_widths)
            open_ &= ~fits
            if not open_.any():
                break
        place = words(TRIES // 2)
        return {
            "top": np.where(open_, heights - box_heights >> 1, below(place[0], heights - box_heights + 1)),
            "left": np.where(open_, widths - box_widths >> 1, below(place[1], widths - box_widths + 1)),
            "height": box_heights,
            "width": box_widths,
        }

    def _fallback(self, heights: Integers, widths: Integers) -> tuple[Integers, Integers]:
        """(heights, widths) of the largest boxes whose ratio is within the limits."""
        low, high = (round(end * (1 << RATIO_BITS)) for end in self.ratio)
        across, down = widths << RATIO_BITS, heights
        cut_heights = (((widths << RATIO_BITS + 1) // low) + 1) >> 1
        cut_widths = (heights * high + (1 << RATIO_BITS - 1)) >> RATIO_BITS
        box_heights = np.where(across < down * low, np.clip(cut_heights, 1, heights), heights)
        box_widths = np.where(across > down * high, np.clip(cut_widths, 1, widths), widths)
        return box_heights, box_widths


class ResizeCentreCrop(BoxOp):
    """Resize the shorter side to `resize` and crop the centre: the box is the part of the picture that remains.

    Attributes:
        resize: of the shorter side; None for 8/7 of the view's shorter side, 256 for 224.
    """

    op: Literal["resize-centre-crop"] = "resize-centre-crop"
    size: ViewSize
    resize: Annotated[int, Field(ge=1, le=1 << 15)] | None = None
    interpolation: Interpolation = "bilinear"

    @model_validator(mode="after")
    def _crop_is_not_larger(self) -> ResizeCentreCrop:
        shorter = min(self.view_size)
        if self.resize is not None and self.resize < shorter:
            raise ValueError(f"resize must be at least the shorter side of the view, {shorter}")
        return self

    @property
    def view_size(self) -> Size:
        return _pair(self.size)

    def needs(self, size: Size) -> Needs:
        shape = _shape(self.view_size)
        return *size, _shorter(size, self.view_size, self.resize), 1.0, (shape, shape), shape

    def clean_boxes(self, sizes: Integers) -> dict[str, Integers]:
        return centre_boxes(sizes, self.view_size, self.resize or evaluation_resize(self.view_size))


def evaluation_resize(view: Size) -> int:
    """The length of a picture's shorter side from whose centre test images of a view's size are cut."""
    return round(min(view) / EVALUATION_CROP)


def _shorter(size: Size, view: Size, resize: int | None) -> int:
    """The shorter side of a picture whose centred box of `view` is not smaller than `size`."""
    enlarged = max(length / of_view for length, of_view in zip(size, view, strict=True))
    return math.ceil((resize or evaluation_resize(view)) * enlarged)


def _shape(size: Size) -> float:
    return size[1] / size[0]


def centre_boxes(sizes: Integers, view: Size, resize: int) -> dict[str, Integers]:
    """The centred boxes of `view` on pictures whose shorter side is resized to `resize`.

    Where a picture is too narrow for that, the largest centred box of the view's shape.
    """
    heights, widths = sizes[:, 0], sizes[:, 1]
    over, under = np.minimum(heights, widths), np.full(len(sizes), resize)  # pixels of the picture per pixel: a ratio
    for length, needed in ((heights, view[0]), (widths, view[1])):
        less = length * under < over * needed
        over, under = np.where(less, length, over), np.where(less, needed, under)
    box_heights, box_widths = (
        np.clip((2 * over * side + under) // (2 * under), 1, limit)
        for side, limit in zip(view, (heights, widths), strict=True)
    )
    return {
        "top": heights - box_heights >> 1,
        "left": widths - box_widths >> 1,
        "height": box_heights,
        "width": box_widths,
    }


@functools.cache
def exponents(ratio: tuple[float, float]) -> tuple[int, int]:
    """The first and last k with 2^(k/65536) within the limits; if there is none, twice the last one below them."""
    low, high = (round(end * (1 << RATIO_BITS)) for end in ratio)
    first = _search(lambda k: int(power_of_two(np.array([k]))[0]) >= low)
    last = _search(lambda k: int(power_of_two(np.array([k]))[0]) > high) - 1
    return min(first, last), last


def power_of_two(exponent: Integers) -> Integers:
    """⌊2^(exponent/65536) · 2¹⁶⌋ to within one, for exponents −5·65536 … 5·65536 − 1 (1/32 to 32)."""
    coarse, fine = _root_tables()
    value = coarse[exponent >> 8 & 255] * fine[exponent & 255] >> _TABLE_BITS
    return value >> _TABLE_BITS - RATIO_BITS - (exponent >> 16)


def _pair(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else size


def _search(is_reached: Callable[[int], bool]) -> int:
    """The first exponent at which a condition that stays true becomes true."""
    low, high = -5 * EXPONENT_STEPS, 5 * EXPONENT_STEPS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_reached(middle) else (middle + 1, high)
    return low


@functools.cache
def _root_tables() -> tuple[Integers, Integers]:
    """⌊2^(k/256) · 2³⁰⌋ and ⌊2^(k/65536) · 2³⁰⌋ for k = 0 … 255."""
    return _powers(8), _powers(16)


def _powers(roots: int) -> Integers:
    """⌊2^(k / 2^roots) · 2³⁰⌋ for k = 0 … 255, from repeated integer square roots with 128 fraction bits."""
    base = 2 << _ROOT_BITS
    for _ in range(roots):
        base = math.isqrt(base << _ROOT_BITS)
    powers, value = [], 1 << _ROOT_BITS
    for _ in range(256):
        powers.append(value >> _ROOT_BITS - _TABLE_BITS)
        value = value * base >> _ROOT_BITS
    return np.array(powers, dtype=np.int64)


def _wide_below(words: npt.NDArray[np.uint32], limit: Integers) -> Integers:
    """⌊word · limit / 2³²⌋ for limits up to 2⁴⁶, by halves of the word."""
    half = WORD_BITS // 2
    upper, lower = words.astype(np.int64) >> half, words.astype(np.int64) & (1 << half) - 1
    return (upper * limit + (lower * limit >> half)) >> half
