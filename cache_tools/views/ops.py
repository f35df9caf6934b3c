"""The ops of a view: frozen recipes, and the integers that each op draws for a sample.

An op draws whole numbers (offsets, sides, fixed-point factors) from the Philox words of its own draws by integer
arithmetic. `cache_tools/views/pixels.py` applies them to pixels, again by integer arithmetic. No torch here.

To add an op: its class here, its name in `ViewOp` (`views/recipe.py`), its pixels in `views/pixels.py`. Adding one
needs no new version of ViewRecipe; a change of what an op draws does, because existing caches were built with this one.
The ops that choose a box of the picture are in `views/boxes.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field

from cache_tools.config import Frozen
from cache_tools.config.fields import Number, Whole
from cache_tools.errors import RecipeError
from cache_tools.lazy import np
from cache_tools.philox import below, chance

if TYPE_CHECKING:
    import numpy.typing as npt


Size = tuple[int, int]
Integers: TypeAlias = "npt.NDArray[np.int64]"
Words: TypeAlias = "Callable[[int], npt.NDArray[np.uint32]]"  # draw number → uint32 [4, N]

MAX_SIDE = 16_384  # areas times 2³² stay below 2⁶³
ONE = 1 << 16  # 1.0 of a colour factor
HUE_STEPS = 1024  # per full turn
OCTAVE_STEPS = 256  # aspect ratios per doubling
RATIO_BITS = 16

Probability = Annotated[Number, Field(ge=0.0, le=1.0)]
Grey = Annotated[Whole, Field(ge=0, le=255)]
Side = Annotated[Whole, Field(ge=1, le=MAX_SIDE)]


def _ordered(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("the lower limit must come first")
    return limits


Scale = Annotated[
    tuple[Annotated[float, Field(gt=0.0, le=1.0)], Annotated[float, Field(gt=0.0, le=1.0)]], AfterValidator(_ordered)
]
Ratio = Annotated[
    tuple[Annotated[float, Field(ge=0.05, le=20.0)], Annotated[float, Field(ge=0.05, le=20.0)]],
    AfterValidator(_ordered),
]


class Op(Frozen):
    """The interface of an op; `count` is the number of samples, `size` the (height, width) of its input."""

    def output_size(self, size: Size) -> Size:
        """(height, width) of its output. Raises RecipeError if it cannot work on images of this size."""
        return size

    def draw(self, words: Words, size: Size) -> dict[str, Integers]:
        """Draw the parameters: name → int64 [N]. `words(k)` are the four Philox words [4, N] of the op's draw k."""
        return {}

    def neutral(self, count: int, size: Size) -> dict[str, Integers]:
        """The parameters that leave an image unchanged, with the names and shapes of `draw`."""
        return {}

    def rescaled(self, values: dict[str, Integers], drawn_for: Size, size: Size) -> dict[str, Integers]:
        """Parameters drawn for views of one size, for the same view at another size."""
        return values


class Identity(Op):
    """Leave the image unchanged."""

    op: Literal["identity"] = "identity"


class PadCrop(Op):
    """Pad each side and crop the old size at a uniform offset: `top`, `left` in 0 … 2·padding. Words 0 and 1.

    `fill` is a grey level or `reflect` (mirror without repeating the edge pixel).
    """

    op: Literal["pad-crop"] = "pad-crop"
    padding: Annotated[int, Field(ge=0, le=MAX_SIDE)] = 4
    fill: Literal["reflect"] | Grey = 0

    def output_size(self, size: Size) -> Size:
        if self.fill == "reflect" and self.padding >= min(size):
            raise RecipeError(
                "cannot reflect more pixels than the image has",
                where="pad-crop",
                expected=f"padding below {min(size)}",
                found=self.padding,
                next_step="use a smaller padding or a constant fill",
            )
        return size

    def draw(self, words: Words, size: Size) -> dict[str, Integers]:
        offsets = below(words(0)[:2], 2 * self.padding + 1)
        return {"top": offsets[0], "left": offsets[1]}

    def neutral(self, count: int, size: Size) -> dict[str, Integers]:
        return {"top": np.full(count, self.padding), "left": np.full(count, self.padding)}


class Flip(Op):
    """Mirror left and right with `probability`: `flipped` is 0 or 1. Word 0; at one half, its top bit decides."""

    op: Literal["flip"] = "flip"
    probability: Probability = 0.5

    def draw(self, words: Words, size: Size) -> dict[str, Integers]:
        return {"flipped": chance(words(0)[0], self.probability).astype(np.int64)}

    def neutral(self, count: int, size: Size) -> dict[str, Integers]:
        return {"flipped": np.zeros(count, dtype=np.int64)}


class ColourJitter(Op):
    """Change brightness, contrast, saturation and hue, in this order. Words 0 to 3.

    The first three are factors in 1/65536, uniform in 1 ± strength. Hue is a turn about the grey axis in 1/1024 of a
    full turn, uniform in ± strength (0.5: every hue). The turn keeps greys exactly and luma nearly; it is not HSV.
    """

    op: Literal["colour-jitter"] = "colour-jitter"
    brightness: Probability = 0.0
    contrast: Probability = 0.0
    saturation: Probability = 0.0
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0

    def draw(self, words: Words, size: Size) -> dict[str, Integers]:
        first = words(0)
        spans = {
            "brightness": round(self.brightness * ONE),
            "contrast": round(self.contrast * ONE),
            "saturation": round(self.saturation * ONE),
        }
        drawn = {name: ONE - span + below(first[k], 2 * span + 1) for k, (name, span) in enumerate(spans.items())}
        steps = round(self.hue * HUE_STEPS)
        return drawn | {"hue": below(first[3], 2 * steps + 1) - steps}

    def neutral(self, count: int, size: Size) -> dict[str, Integers]:
        factors = {name: np.full(count, ONE) for name in ("brightness", "contrast", "saturation")}
        return factors | {"hue": np.zeros(count, dtype=np.int64)}


class RandomErasing(Op):
    """Paint over a box of `draw_box` with `probability`; `height` and `width` are 0 where nothing is erased.

    The box takes words 0 to 3 of draw 0. Draw 1 decides whether to erase (word 0) and, with `fill: random`, gives one
    random colour per sample (words 1 to 3). Otherwise `fill` is a grey level or an RGB colour. The parameters always
    have `red`, `green` and `blue`.
    """

    op: Literal["random-erasing"] = "random-erasing"
    probability: Probability = 0.5
    scale: Scale = (0.02, 1 / 3)
    ratio: Ratio = (0.3, 1 / 0.3)
    fill: Literal["random"] | Grey | tuple[Grey, Grey, Grey] = 0

    def draw(self, words: Words, size: Size) -> dict[str, Integers]:
        gate, *colours = words(1)
        box = draw_box(words(0), size, self.scale, self.ratio)
        erased = chance(gate, self.probability)
        box["height"], box["width"] = box["height"] * erased, box["width"] * erased
        return box | self._colour([below(word, 256) for word in colours])

    def neutral(self, count: int, size: Size) -> dict[str, Integers]:
        zero = np.zeros(count, dtype=np.int64)
        return {"top": zero, "left": zero, "height": zero, "width": zero} | self._colour([zero, zero, zero])

    def rescaled(self, values: dict[str, Integers], drawn_for: Size, size: Size) -> dict[str, Integers]:
        return rescaled_box(values, drawn_for, size)

    def _colour(self, drawn: list[Integers]) -> dict[str, Integers]:
        if self.fill != "random":
            fixed = (self.fill,) * 3 if isinstance(self.fill, int) else self.fill
            drawn = [np.full_like(like, level) for like, level in zip(drawn, fixed, strict=True)]
        return dict(zip(("red", "green", "blue"), drawn, strict=True))


def draw_box(
    words: npt.NDArray[np.uint32], size: Size, scale: tuple[float, float], ratio: tuple[float, float]
) -> dict[str, Integers]:
    """Draw a box inside the image from four words per sample: `top`, `left`, `height`, `width`.

    The area is uniform over the whole numbers from scale[0] to scale[1] of the image, bounded by the largest box that
    both the image and the ratios allow. Width / height is log-uniform, in steps of 2^(1/256), over the ratios with
    which that area fits into the image. The position is uniform. torchvision draws area and ratio freely and rejects
    boxes that do not fit, up to ten times, so large boxes are a little rarer there.
    """
    height, width = size
    table = ratio_table()
    low, high = _ratio_range(ratio)
    fits = min(height * height * int(table[high]) >> RATIO_BITS, (width * width << RATIO_BITS) // int(table[low]))
    largest = max(1, min(round(scale[1] * height * width), fits))
    smallest = max(1, min(round(scale[0] * height * width), largest))
    area = smallest + below(words[0], largest - smallest + 1)
    # a box of this area fits into the image for ratios in area / height² … width² / area
    first = np.clip(np.searchsorted(table, (area << RATIO_BITS) // (height * height)), low, high)
    last = np.clip(np.searchsorted(table, (width * width << RATIO_BITS) // area, side="right") - 1, first, high)
    fixed_ratio = table[first + below(words[1], last - first + 1)]
    box_width = np.clip(rounded_sqrt(area * fixed_ratio, RATIO_BITS), 1, width)
    box_height = np.clip(rounded_sqrt((area << 2 * RATIO_BITS) // fixed_ratio, RATIO_BITS), 1, height)
    return {
        "top": below(words[2], height - box_height + 1),
        "left": below(words[3], width - box_width + 1),
        "height": box_height,
        "width": box_width,
    }


def rescaled_box(values: dict[str, Integers], drawn_for: Size, size: Size) -> dict[str, Integers]:
    """`values` with the box `top`, `left`, `height`, `width` of a view of one size on the same view at another."""
    changed = dict(values)
    for axis, (start, length) in enumerate((("top", "height"), ("left", "width"))):
        first, end = (
            (2 * edge * size[axis] + drawn_for[axis]) // (2 * drawn_for[axis])
            for edge in (values[start], values[start] + values[length])
        )
        changed[start], changed[length] = first, end - first
    return changed


def rounded_sqrt(value: Integers, bits: int) -> Integers:
    """round(√(value / 2^bits)), halves up, exactly: ⌊(⌊√(4 · value / 2^bits)⌋ + 1) / 2⌋."""
    return (integer_sqrt((value << 2) >> bits) + 1) >> 1


def integer_sqrt(value: Integers) -> Integers:
    """⌊√value⌋ for 0 ≤ value < 2⁵², exact however the machine rounds its square root."""
    root = np.sqrt(value.astype(np.float64)).astype(np.int64)
    root -= root * root > value
    root += (root + 1) * (root + 1) <= value
    return root


@functools.cache
def ratio_table() -> Integers:
    """⌊2^(k/256) · 2¹⁶⌋ for k = −1280 … 1280 (1/32 to 32), ascending; integer square roots make it exact."""
    extra = 8  # bits below the fixed point, so that ratios below 1 keep their precision
    octave = []
    for step in range(OCTAVE_STEPS):
        value = 1 << (step + (RATIO_BITS + extra) * OCTAVE_STEPS)
        for _ in range(8):  # 256 = 2⁸: eight square roots are the 256th root
            value = math.isqrt(value)
        octave.append(value)
    table = [
        octave[k % OCTAVE_STEPS] << 5 + k // OCTAVE_STEPS >> 5 + extra
        for k in range(-5 * OCTAVE_STEPS, 5 * OCTAVE_STEPS + 1)
    ]
    return np.array(table, dtype=np.int64)


def _ratio_range(ratio: tuple[float, float]) -> tuple[int, int]:
    """Positions of the smallest and largest ratio within the limits; if there is none, twice the next lower one."""
    table = ratio_table()
    low = int(np.searchsorted(table, round(ratio[0] * (1 << RATIO_BITS))))
    high = int(np.searchsorted(table, round(ratio[1] * (1 << RATIO_BITS)), side="right")) - 1
    return min(low, high), high
