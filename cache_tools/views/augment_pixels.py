"""The pixels of the operations of `views/augment.py` and of version 2's colour jitter: uint8 in and out, in integers.

Each operation equals torchvision's function of the same parameters to within one grey level, border pixels included;
where torchvision cuts off the fraction of a result, so does this. Sines, exponentials and π come from integer series,
so that no mathematics library can round them differently. A change of any result needs a new version of ViewRecipe.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from cache_tools.views.augment import DEGREE, KINDS, PIXEL, SIGMA, ChoiceOp, Fill, RandAugment, Rotation, Sampling
from cache_tools.views.augment import TrivialAugmentWide as Trivial
from cache_tools.views.ops import HUE_STEPS, ONE, ColourJitter, Integers

COLOUR_BITS = 16
GREY = (19_589, 38_470, 7_471)  # torchvision's 0.2989, 0.587 and 0.114, in 1/65536
MATRIX_BITS, TAP_BITS = 24, 11  # of an affine map; of its bilinear weights
BLUR_BITS, BETWEEN_BITS = 14, 8  # of a blur's weights; of its rows, before the columns
SERIES_BITS = 128

Change = Callable[[Tensor, Integers], Tensor]  # uint8 [n, 3, H, W] and the amounts int64 [n] → uint8 of the same shape


def change(images_NCHW: Tensor, op: ChoiceOp | Rotation | ColourJitter, values: Mapping[str, Integers]) -> Tensor:
    """Apply an op with the parameters that it drew for these images."""
    if isinstance(op, ColourJitter):
        return _jitter(images_NCHW, op, values)
    if isinstance(op, Rotation):
        return transform(images_NCHW, rotations(values["angle"]), op.interpolation, op.fill)
    sampling, fill = (op.interpolation, op.fill) if isinstance(op, RandAugment | Trivial) else ("nearest", 0)
    for layer in range(op.layers):
        images_NCHW = _chosen(images_NCHW, values[f"kind_{layer}"], values[f"amount_{layer}"], sampling, fill)
    return images_NCHW


def operation(name: str, images_NCHW: Tensor, amount: Integers, sampling: Sampling, fill: Fill) -> Tensor:
    """Apply one kind of operation (`augment.KINDS`) to every image, each with its amount."""
    if name in _CHANGES:
        return _CHANGES[name](images_NCHW, amount)
    height, width = images_NCHW.shape[2:]
    return transform(images_NCHW, _matrices(name, amount, height, width), sampling, fill)


def transform(images_NCHW: Tensor, matrix_N6: Integers, sampling: Sampling, fill: Fill) -> Tensor:
    """Sample each image at the places of an affine map, as torchvision's `affine` does.

    Args:
        matrix_N6: a, b, c, d, e, f in 2⁻²⁴: the pixel at (x, y) comes from (a·x + b·y + c, d·x + e·y + f), where x and
            y count from the centre of the image.
        fill: outside the image. At its border, bilinear sampling mixes it in twice, as torchvision does.
    """
    count, channels, height, width = images_NCHW.shape
    device = images_NCHW.device
    a, b, c, d, e, f = torch.from_numpy(np.ascontiguousarray(matrix_N6.T)).to(device).view(6, count, 1, 1)
    across = (2 * torch.arange(width, device=device) + 1 - width).view(1, 1, width)  # in half pixels
    down = (2 * torch.arange(height, device=device) + 1 - height).view(1, height, 1)
    x = a * across + b * down + (2 * c + ((width - 1) << MATRIX_BITS))  # in 2⁻²⁵ pixels from the first pixel's centre
    y = d * across + e * down + (2 * f + ((height - 1) << MATRIX_BITS))
    colour = torch.tensor((fill,) * 3 if isinstance(fill, int) else fill, dtype=torch.int32, device=device)
    colour = colour.view(1, 3, 1)
    flat = images_NCHW.reshape(count, channels, height * width)

    def read(column: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """The levels [n, 3, H·W] at whole places, and whether these are inside [n, 1, H·W]."""
        inside = ((column >= 0) & (column < width) & (row >= 0) & (row < height)).view(count, 1, -1)
        place = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
        return flat.gather(2, place.view(count, 1, -1).expand(-1, channels, -1)), inside

    if sampling == "nearest":
        half = 1 << MATRIX_BITS
        levels, inside = read(x + half >> MATRIX_BITS + 1, y + half >> MATRIX_BITS + 1)
        return torch.where(inside, levels, colour.to(torch.uint8)).view(images_NCHW.shape)
    shift = MATRIX_BITS + 1 - TAP_BITS
    x, y = x + (1 << shift - 1) >> shift, y + (1 << shift - 1) >> shift  # in 2⁻¹¹ pixels
    one = 1 << TAP_BITS
    column, row, right, lower = x >> TAP_BITS, y >> TAP_BITS, x & one - 1, y & one - 1
    total = torch.zeros(count, channels, height * width, dtype=torch.int32, device=device)
    covered = torch.zeros(count, 1, height * width, dtype=torch.int32, device=device)
    for step_x, weight_x in ((0, one - right), (1, right)):
        for step_y, weight_y in ((0, one - lower), (1, lower)):
            levels, inside = read(column + step_x, row + step_y)
            weight = (weight_x * weight_y).view(count, 1, -1).to(torch.int32).mul_(inside)
            total += levels * weight
            covered += weight
    share = covered >> TAP_BITS
    mixed = share * ((total >> TAP_BITS) - (colour << TAP_BITS)) + (colour << 2 * TAP_BITS)
    return _rounded(mixed, 2 * TAP_BITS).view(images_NCHW.shape)


def rotations(angle: Integers) -> Integers:
    """The maps of `transform` for rotations in 1/64 degree, anticlockwise."""
    table = np.array([sine_cosine(int(each)) for each in angle], dtype=np.int64).reshape(-1, 2)
    sine, cosine = table[:, 0], table[:, 1]
    zero = np.zeros_like(sine)
    return np.stack([cosine, -sine, zero, sine, cosine, zero], axis=1)


@functools.lru_cache(maxsize=1 << 14)
def sine_cosine(angle: int) -> tuple[int, int]:
    """Sine and cosine of an angle in 1/64 degree, in 2⁻²⁴, rounded, from their series in integers of 128 bits."""
    radians = _pi() * abs(angle) // (180 * DEGREE)
    sine = cosine = number = 0
    term = 1 << SERIES_BITS
    while term:
        signed = -term if number // 2 % 2 else term
        sine, cosine = (sine + signed, cosine) if number % 2 else (sine, cosine + signed)
        number += 1
        term = term * radians // (number << SERIES_BITS)
    shift = SERIES_BITS - MATRIX_BITS
    half = 1 << shift - 1
    return (sine + half >> shift) * (1 if angle >= 0 else -1), cosine + half >> shift


@functools.lru_cache(maxsize=1 << 10)
def blur_weights(deviation: int) -> tuple[int, ...]:
    """The weights of a Gaussian at 0, 1, 2, … pixels, in 2⁻¹⁴; both sides add up to one. It ends at three deviations.

    The deviation is in 1/64 pixel. The weight of the centre takes what rounding leaves.
    """
    radius = -(-3 * deviation // SIGMA)
    parts = [_exponential(place * place * SIGMA * SIGMA, 2 * deviation * deviation) for place in range(radius + 1)]
    total = parts[0] + 2 * sum(parts[1:])
    sides = [((part << BLUR_BITS + 1) + total) // (2 * total) for part in parts[1:]]
    return ((1 << BLUR_BITS) - 2 * sum(sides), *sides)


def _chosen(images: Tensor, kind: Integers, amount: Integers, sampling: Sampling, fill: Fill) -> Tensor:
    """Apply to each image its own kind of operation."""
    made = images
    for number in np.unique(kind).tolist():
        if KINDS[number] == "identity":
            continue
        rows = np.flatnonzero(kind == number)
        if len(rows) == len(kind):
            return operation(KINDS[number], images, amount, sampling, fill)
        if made is images:
            made = images.clone(memory_format=torch.contiguous_format)
        place = torch.from_numpy(rows).to(images.device)
        made.index_copy_(0, place, operation(KINDS[number], images[place], amount[rows], sampling, fill))
    return made


def _matrices(name: str, amount: Integers, height: int, width: int) -> Integers:
    """The maps of `transform` for a kind of operation. Shears keep the upper left corner."""
    if name == "rotate":
        return rotations(amount)
    one, zero = np.full_like(amount, 1 << MATRIX_BITS), np.zeros_like(amount)
    shear, shift = amount << MATRIX_BITS - 16, amount * ((1 << MATRIX_BITS) // PIXEL)
    maps = {
        "shear-x": (one, shear, shear * height // 2, zero, one, zero),
        "shear-y": (one, zero, zero, shear, one, shear * width // 2),
        "translate-x": (one, zero, shift, zero, one, zero),
        "translate-y": (one, zero, zero, zero, one, shift),
    }
    return np.stack(maps[name], axis=1)


def _column(amount: Integers, images: Tensor) -> Tensor:
    """Amounts as int32 [n, 1, 1, 1] on the images' device."""
    return torch.from_numpy(amount.astype(np.int32)).to(images.device).view(-1, 1, 1, 1)


def _blend(images: Tensor, other: Tensor | int, factor: Tensor) -> Tensor:
    """images · factor + other · (1 − factor), cut off and kept in 0 … 255; `other` is int32."""
    mixed = images.to(torch.int32) * factor + other * (ONE - factor)
    return mixed.bitwise_right_shift_(COLOUR_BITS).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """int32 [n, 1, H, W]: (19589 R + 38470 G + 7471 B) / 65536, cut off."""
    red, green, blue = (images[:, channel : channel + 1].to(torch.int32) for channel in range(3))
    return red.mul_(GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2]).bitwise_right_shift_(COLOUR_BITS)


def _brightness(images: Tensor, amount: Integers) -> Tensor:
    return _blend(images, 0, _column(amount, images))


def _colour(images: Tensor, amount: Integers) -> Tensor:
    return _blend(images, _grey(images), _column(amount, images))


def _contrast(images: Tensor, amount: Integers) -> Tensor:
    """Blend with the mean of the grey levels, which keeps its fraction."""
    factor = _column(amount, images)
    grey = _grey(images)
    area = grey.shape[2] * grey.shape[3]
    total = grey.sum(dim=(2, 3), keepdim=True, dtype=torch.int64)
    mean = torch.div(total << COLOUR_BITS, area, rounding_mode="floor")
    other = (mean * (ONE - factor.to(torch.int64))) >> COLOUR_BITS
    mixed = images.to(torch.int32) * factor + other.to(torch.int32)
    return mixed.bitwise_right_shift_(COLOUR_BITS).clamp_(0, 255).to(torch.uint8)


def _sharpness(images: Tensor, amount: Integers) -> Tensor:
    """Blend with the mean of 3 × 3 pixels, the middle one counted five times; the border stays as it is."""
    height, width = images.shape[2:]
    if height < 3 or width < 3:
        return images
    pixels = images.to(torch.int32)
    inner = pixels[:, :, 1:-1, 1:-1]
    total = 4 * inner
    for row in range(3):
        for column in range(3):
            total = total + pixels[:, :, row : row + height - 2, column : column + width - 2]
    smooth = torch.div(total + 6, 13, rounding_mode="floor")
    sharp = images.clone(memory_format=torch.contiguous_format)
    sharp[:, :, 1:-1, 1:-1] = _blend(inner, smooth, _column(amount, images))
    return sharp


def _auto_contrast(images: Tensor, amount: Integers) -> Tensor:
    """Stretch each channel to 0 … 255; a channel of one level stays as it is."""
    low, high = (end(dim=(2, 3), keepdim=True).to(torch.int32) for end in (images.amin, images.amax))
    stretched = torch.div((images - low) * 255, (high - low).clamp(min=1), rounding_mode="floor")
    return torch.where(high > low, stretched, images.to(torch.int32)).to(torch.uint8)


def _equalise(images: Tensor, amount: Integers) -> Tensor:
    """Equalise the histogram of each channel by PIL's rule; a channel with too few other levels stays as it is."""
    count, channels, height, width = images.shape
    levels = images.reshape(count * channels, -1).to(torch.int64)
    histogram = torch.zeros(len(levels), 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(1, levels, torch.ones_like(levels))
    step = (height * width - histogram.gather(1, levels.amax(1, keepdim=True))) // 255
    below_ = histogram.cumsum(1) - histogram  # pixels of lower levels
    table = ((below_ + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    made = torch.where(step > 0, table.gather(1, levels), levels)
    return made.to(torch.uint8).view(images.shape)


def _invert(images: Tensor, amount: Integers) -> Tensor:
    return 255 - images


def _posterise(images: Tensor, amount: Integers) -> Tensor:
    return images & _column(256 - (1 << 8 - amount), images).to(torch.uint8)


def _solarise(images: Tensor, amount: Integers) -> Tensor:
    return torch.where(images >= _column(amount, images), 255 - images, images)


def _solarise_add(images: Tensor, amount: Integers) -> Tensor:
    brighter = (images + _column(amount, images)).clamp_(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def _to_grey(images: Tensor, amount: Integers) -> Tensor:
    return _grey(images).to(torch.uint8).expand(images.shape)


def _blur(images: Tensor, amount: Integers) -> Tensor:
    """Gaussian blur, rows and columns one after the other; pictures are mirrored at their border."""
    made = torch.empty_like(images, memory_format=torch.contiguous_format)
    for deviation in np.unique(amount).tolist():
        rows = torch.from_numpy(np.flatnonzero(amount == deviation)).to(images.device)
        weights = blur_weights(deviation)
        fixed = _smooth(images[rows].to(torch.int32), weights, dim=3)
        fixed = fixed.add_(1 << BLUR_BITS - BETWEEN_BITS - 1).bitwise_right_shift_(BLUR_BITS - BETWEEN_BITS)
        made[rows] = _rounded(_smooth(fixed, weights, dim=2), BLUR_BITS + BETWEEN_BITS)
    return made


def _smooth(pixels: Tensor, weights: tuple[int, ...], dim: int) -> Tensor:
    length = pixels.shape[dim]
    period, order = max(1, 2 * (length - 1)), torch.arange(length, device=pixels.device)
    total = pixels * weights[0]
    for distance, weight in enumerate(weights[1:], start=1):
        for shift in (-distance, distance):
            place = (order + shift) % period
            place = torch.minimum(place, period - place) if length > 1 else torch.zeros_like(order)
            total.add_(pixels.index_select(dim, place), alpha=weight)
    return total


def _jitter(images: Tensor, op: ColourJitter, values: Mapping[str, Integers]) -> Tensor:
    """Brightness, contrast, saturation and hue, in this order. A strength of 0 changes nothing: the step is skipped."""
    if op.brightness:
        images = _brightness(images, values["brightness"])
    if op.contrast:
        images = _contrast(images, values["contrast"])
    if op.saturation:
        images = _colour(images, values["saturation"])
    return hue(images, values["hue"]) if op.hue else images


def hue(images: Tensor, steps: Integers) -> Tensor:
    """Turn the hue of HSV by steps of 1/1024 of a full turn."""
    pixels = images.to(torch.int64)
    high, low = pixels.amax(1), pixels.amin(1)
    span = high - low
    red, green, blue = pixels.unbind(1)
    is_red, is_green = red == high, green == high
    # the place in the six parts of the circle, times the span
    place = torch.where(is_red, green - blue, torch.where(is_green, 2 * span + blue - red, 4 * span + red - green))
    turn = 6 * ONE
    angle = torch.div(place << COLOUR_BITS, span.clamp(min=1), rounding_mode="floor")
    shift = _column(steps * (turn // HUE_STEPS), images).to(torch.int64)[:, 0]
    angle = (angle + shift) % turn
    part, fraction = angle >> COLOUR_BITS, angle & ONE - 1
    half = ONE >> 1
    falling = (high << COLOUR_BITS) - span * fraction + half >> COLOUR_BITS
    rising = (low << COLOUR_BITS) + span * fraction + half >> COLOUR_BITS
    choices = torch.stack([high, falling, low, low, rising, high])  # of red, in the six parts
    turned = [choices.gather(0, ((part + delay) % 6)[None])[0] for delay in (0, 4, 2)]
    return torch.stack(turned, dim=1).to(torch.uint8)


def _rounded(fixed: Tensor, bits: int) -> Tensor:
    """Numbers with fraction bits as grey levels: to the nearest, in 0 … 255."""
    return fixed.add_(1 << bits - 1).bitwise_right_shift_(bits).clamp_(0, 255).to(torch.uint8)


def _exponential(over: int, under: int) -> int:
    """exp(−over / under) in 2⁻⁶⁴, cut off, from the series of exp(over / under) in integers."""
    total, term, number = 0, 1 << SERIES_BITS, 0
    while term:
        total += term
        number += 1
        term = term * over // (number * under)
    return (1 << SERIES_BITS + 64) // total


@functools.cache
def _pi() -> int:
    """π in 2⁻¹²⁸ to within 2⁻¹²⁰, by Machin's formula."""

    def arc_tangent(inverse: int) -> int:
        total, power, number = 0, (1 << SERIES_BITS) // inverse, 1
        while power:
            total += power // number if number % 4 == 1 else -(power // number)
            power //= inverse * inverse
            number += 2
        return total

    return 4 * (4 * arc_tangent(5) - arc_tangent(239))


_CHANGES: dict[str, Change] = {
    "auto-contrast": _auto_contrast,
    "equalise": _equalise,
    "invert": _invert,
    "posterise": _posterise,
    "solarise": _solarise,
    "solarise-add": _solarise_add,
    "colour": _colour,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "grey": _to_grey,
    "blur": _blur,
}
