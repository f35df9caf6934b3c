"""Decode the bytes of an image file to RGB: transparency, orientation and values of more than eight bits."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cache_tools.errors import DataError
from cache_tools.images.formats import register_decoders
from cache_tools.images.headers import image_size
from cache_tools.images.recipe import WHITE, Colour, ValueRange

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 178_956_970  # PIL's limit against decompression bombs, enforced even if a program has lifted it
SET_RANGE = "set the range that black and white stand for, such as --set dataset.value_range='[0, 4095]'"

_JPEG, _SCALES = b"\xff\xd8\xff", (8, 4, 2)
_TIFF_BITS, _TIFF_MIN, _TIFF_MAX, _TIFF_SAMPLE_FORMAT = 258, 280, 281, 339


Needs = tuple[int, int, int, float, tuple[float, float], float]  # the fields of `NeededSize`, as views say them


class NeededSize(NamedTuple):
    """What views need of a picture, so that it may be decoded at a part of its size.

    Attributes:
        height, width: of the largest view. No box that a view shows may be smaller.
        shorter_side: of the picture, at least.
        area: the smallest share of the picture that a box has.
        ratio: (lowest, highest) width / height of a random box.
        shape: width / height of a centred box.
    """

    height: int
    width: int
    shorter_side: int
    area: float
    ratio: tuple[float, float]
    shape: float

    def allows(self, height: int, width: int) -> bool:
        """Whether every box of a picture of this size, upright or turned, is as large as the view.

        Only multiplication and comparison of float64, so the answer is the same on every machine.
        """
        (low, high), pixels = self.ratio, self.area * height * width
        down, across = self.height + 1, self.width + 1  # one pixel is for rounding
        if min(height, width) < self.shorter_side or pixels * low < across * across or pixels < high * down * down:
            return False
        # A box of a limited ratio that is as large as the picture lets it be; the fallback of a random crop is one.
        return all(
            min(wide, tall * highest) >= across and min(tall * lowest, wide) >= down * lowest
            for tall, wide in ((height, width), (width, height))
            for lowest, highest in (self.ratio, (self.shape, self.shape))
        )


@dataclass(frozen=True)
class PixelRules:
    """What decoding needs to know besides the file.

    Attributes:
        background: the colour behind transparent pixels.
        value_range: (black, white) of images with more than eight bits per pixel; None for the range that their
            format declares.
        needed: of pictures at their own size, so that JPEG files are decoded at 1/2, 1/4 or 1/8 of it where that is
            enough; None for the whole size.
    """

    background: Colour = WHITE
    value_range: ValueRange | None = None
    needed: NeededSize | None = field(default=None, repr=False)  # of no account where the text of the rules is used

    def with_needs(self, needed: Needs | None) -> PixelRules:
        return replace(self, needed=None if needed is None else NeededSize._make(needed))


@dataclass(frozen=True)
class Finding:
    """What a check of one image found; without a field it is an ordinary one.

    Attributes:
        problem: why it cannot be decoded.
        frames: it has several frames or pages, of which the first is used.
        deep: (lowest, highest) value of 16-bit pixels whose range no field of the file declares.
        unknown_range: (lowest, highest) value of pixels that cannot be decoded until their range is given.
        kind: of the values, for `deep` and `unknown_range`.
    """

    problem: str | None = None
    frames: bool = False
    deep: tuple[float, float] | None = None
    unknown_range: tuple[float, float] | None = None
    kind: str = ""

    @property
    def range_problem(self) -> str | None:
        """Why the image cannot be decoded before `dataset.value_range` is given; None if it can."""
        return None if self.unknown_range is None else str(UnknownRangeError(self.kind, *self.unknown_range))


class UnknownRangeError(ValueError):
    """Values whose range neither the format nor the recipe says."""

    def __init__(self, kind: str, low: float, high: float) -> None:
        self.kind, self.low, self.high = kind, low, high
        super().__init__(f"{kind} from {low:g} to {high:g}, whose range is not declared")


def decode_image(
    data: bytes, size: int, where: object, rules: PixelRules = PixelRules(), interpolation: str = "bicubic"
) -> np.ndarray:
    """Decode an image to RGB uint8 [size, size, 3]; of several frames or pages the first.

    Transparent pixels are composited on the background. 16-bit values keep their high byte; other values of more than
    eight bits are scaled by the range that the file declares or the rules give. The image is rotated according to EXIF,
    its shorter side is resized to `size` by antialiased interpolation, and the centre is cropped, as
    torchvision's Resize and CenterCrop do on PIL images.

    Raises:
        DataError: the data do not decode completely, or the range of their values is unknown.
    """
    return _decoded(data, where, rules, lambda image: _fit(image, size, interpolation))


def decode_picture(
    data: bytes, where: object, rules: PixelRules = PixelRules(), *, writable: bool = True
) -> np.ndarray:
    """Decode an image as `decode_image` does, at its own size or the part of it that is needed: RGB uint8 [H, W, 3].

    Args:
        writable: False saves a copy of the pixels, and gives an array that cannot be written to.
    """
    return _decoded(data, where, rules, np.array if writable else np.asarray, scaled=True)


def decoded_size(data: bytes, rules: PixelRules) -> tuple[int, int]:
    """(height, width) of what `decode_picture` makes of an image, before it is turned upright, from its header.

    (0, 0) if the header cannot be read.
    """
    height, width = image_size(data)
    scale = _scale(height, width, rules) if data.startswith(_JPEG) else 1
    return -(-height // scale), -(-width // scale)


def examine_image(data: bytes, rules: PixelRules) -> Finding:
    """Decode an image only to find out whether `decode_image` can; JPEGs are decoded at an eighth of their size."""
    from PIL import Image as pil

    try:
        with _opened(data) as image:
            kind, is_deep = _undeclared_depth(image)
            frames = image.format != "MPO" and bool(getattr(image, "is_animated", False))
            image.draft(image.mode, (1, 1))
            deep = _extrema(image) if is_deep and rules.value_range is None else None
            _upright_rgb(image, rules)
            is_png = image.format == "PNG"
        if is_png:
            with pil.open(io.BytesIO(data)) as image:
                image.verify()  # the checksum of every chunk, which decoding ignores
        return Finding(frames=frames, deep=deep, kind=kind if deep else "")
    except UnknownRangeError as error:
        return Finding(unknown_range=(error.low, error.high), kind=error.kind)
    except Exception as error:
        return Finding(problem=describe(error))


def describe(error: Exception) -> str:
    """The reason of a decoder's error in a few words."""
    text = str(error)
    if text.startswith("cannot identify image file"):
        return "not an image"
    if text == "Truncated File Read" or text.startswith("image file is truncated"):
        return "image file is truncated"
    return text.split("\n", maxsplit=1)[0] or type(error).__name__


@contextmanager
def whole_images_only() -> Iterator[None]:
    """Refuse truncated images here, even if a library has set PIL to pad them with grey, and keep PIL's warnings quiet.

    Enter it once around all threads: both settings belong to the process.
    """
    from PIL import ImageFile

    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextmanager
def _opened(data: bytes) -> Iterator[Image]:
    from PIL import Image as pil

    register_decoders()
    with pil.open(io.BytesIO(data)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels, more than {MAX_PIXELS}")
        yield image


def _upright_rgb(image: Image, rules: PixelRules) -> Image:
    declared, is_deep_colour = _declared_range(image), _is_deep_colour(image)  # before PIL loads the pixels
    image.load()
    _turn_upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled(image, rules, declared)
    if rules.value_range is not None and is_deep_colour:
        raise ValueError("16-bit colour, of which only the high byte can be read: value_range cannot be applied")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    with_alpha = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
    return _composite(with_alpha.convert("RGB"), with_alpha.getchannel("A"), rules)


def _turn_upright(image: Image) -> None:
    """Rotate or mirror the pixels as EXIF says; an image whose EXIF cannot be read stays as it is, as in viewers."""
    from PIL import ImageOps

    with suppress(Exception):  # it fails before it touches the pixels, or afterwards when it writes EXIF again
        ImageOps.exif_transpose(image, in_place=True)


def _composite(image: Image, alpha: Image, rules: PixelRules) -> Image:
    """RGB on the background: alpha · image + (1 − alpha) · background, rounded."""
    from PIL import Image as pil

    if alpha.getextrema() == (255, 255):
        return image
    canvas = pil.new("RGB", image.size, rules.background)
    canvas.paste(image, mask=alpha)
    return canvas


def _scaled(image: Image, rules: PixelRules, declared: tuple[int, int] | None) -> Image:
    """Values of more than eight bits as RGB: their range in 256 steps of equal width, clipped."""
    from PIL import Image as pil

    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("values that are not finite")
    bounds = rules.value_range or declared
    if bounds is None:
        kind = "floating-point values" if image.mode == "F" else "integers"
        raise UnknownRangeError(kind, float(values.min()), float(values.max()))
    low, high = bounds
    if image.mode != "F" and float(low).is_integer() and float(high).is_integer():
        levels = (values.astype(np.int64) - int(low)) * 256 // (int(high) - int(low) + 1)
    else:
        levels = np.floor((values.astype(np.float64) - low) * 256 / (high - low))
    grey = pil.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return _composite(grey, pil.fromarray(alpha), rules)


def _declared_range(image: Image) -> tuple[int, int] | None:
    """(black, white) of integers with more than eight bits, as the file declares them; None for no such integers.

    TIFF's MaxSampleValue counts only where it means a number of bits: some programs write the highest value there.
    """
    if not image.mode.startswith("I"):
        return None
    if image.format != "TIFF":
        return 0, 0xFFFF  # PNG is scaled to its full depth by its specification; PIL scales PNM and JPEG 2000
    bits, lowest, highest = (_tag(image, tag) for tag in (_TIFF_BITS, _TIFF_MIN, _TIFF_MAX))
    if highest and not lowest and highest & (highest + 1) == 0 and highest > 255:
        return 0, highest
    unsigned = _tag(image, _TIFF_SAMPLE_FORMAT) in {None, 1}
    return (0, (1 << bits) - 1) if bits and bits <= 16 and unsigned else None


def _undeclared_depth(image: Image) -> tuple[str, bool]:
    """Whether 16 bits may hold fewer: 12-bit data in 16 bits look black, and only all images together show it."""
    if _is_deep_colour(image):
        return "16-bit colour", True
    if not image.mode.startswith("I") or image.format not in {"PNG", "TIFF"}:
        return "", False
    return "16-bit grey", _declared_range(image) == (0, 0xFFFF) and not _tag(image, _TIFF_MAX)


def _is_deep_colour(image: Image) -> bool:
    """Whether PIL reads only the high byte of each channel."""
    if image.format not in {"PNG", "TIFF"} or image.mode.startswith("I"):
        return False
    tiles: Any = getattr(image, "tile", ())  # (decoder, box, offset, arguments), the first argument is the raw mode
    raw = tiles[0][3] if tiles else ""
    return "16" in str(raw[0] if isinstance(raw, tuple) else raw)


def _extrema(image: Image) -> tuple[float, float]:
    """The lowest and the highest value; high bytes count as 16-bit values."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        return float(values.min()), float(values.max())
    bands = image.getextrema()[: 1 if image.mode == "LA" else 3]
    return 256.0 * min(low for low, _ in bands), 256.0 * max(high for _, high in bands) + 255.0  # type: ignore[misc]


def _scale(height: int, width: int, rules: PixelRules) -> int:
    """The part of its size at which a JPEG is decoded: one in 8, 4, 2 or 1."""
    if rules.needed is not None:
        for scale in _SCALES:
            if rules.needed.allows(-(-height // scale), -(-width // scale)):
                return scale
    return 1


def _decoded(
    data: bytes, where: object, rules: PixelRules, use: Callable[[Image], np.ndarray], *, scaled: bool = False
) -> np.ndarray:
    try:
        with _opened(data) as image:
            if scaled and data.startswith(_JPEG) and (scale := _scale(image.height, image.width, rules)) > 1:
                image.draft(None, (image.width // scale, image.height // scale))
            return use(_upright_rgb(image, rules))
    except Exception as error:  # decoders raise almost any exception on damaged bytes
        unknown = isinstance(error, UnknownRangeError)
        raise DataError(
            "cannot decode an image",
            where=where,
            found=describe(error),
            next_step=SET_RANGE if unknown else "replace the file, or remove it from the folder",
        ) from error


def _tag(image: Image, number: int) -> int | None:
    """An integer tag of a TIFF file, the first if there is one per channel."""
    tags: Any = getattr(image, "tag_v2", {})
    value = tags.get(number)
    first = value[0] if isinstance(value, tuple) and value else value
    return int(first) if isinstance(first, int | float) else None


def _fit(image: Image, size: int, interpolation: str) -> np.ndarray:
    """Resize and crop in one operation, which computes only the pixels inside the crop."""
    from PIL import Image as pil

    width, height = image.size
    short = min(width, height)
    wide, high = size * width // short, size * height // short
    left, top = round((wide - size) / 2), round((high - size) / 2)
    across, down = width / wide, height / high
    box = (left * across, top * down, min((left + size) * across, width), min((top + size) * down, height))
    return np.asarray(image.resize((size, size), pil.Resampling[interpolation.upper()], box))
