"""The ops that draw one of several operations for each sample (RandAugment, TrivialAugment, 3-Augment), and rotation.

They draw a `kind` and an `amount` for each sample and layer; `views/augment_pixels.py` applies them. A kind is the
position in `KINDS`, which only grows at its end. Everything is integer arithmetic; the normal distribution of `mstd` is
a table.
"""

from __future__ import annotations

import functools
import re
from statistics import NormalDist
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator

from cache_tools.lazy import np
from cache_tools.philox import below, chance
from cache_tools.views.ops import ONE, Grey, Integers, Op, Size, Words

KINDS = (
    "identity",
    "auto-contrast",
    "equalise",
    "invert",
    "rotate",  # 1/64 degree, anticlockwise
    "posterise",  # bits that are kept
    "solarise",  # the lowest level that is inverted
    "solarise-add",  # added to levels below 128
    "colour",  # factors in 1/65536: colour is saturation
    "contrast",
    "brightness",
    "sharpness",
    "shear-x",  # 1/65536 pixel per pixel
    "shear-y",
    "translate-x",  # 1/256 pixel of the view
    "translate-y",
    "grey",
    "blur",  # standard deviation in 1/64 pixel of the view
)
KIND = {name: number for number, name in enumerate(KINDS)}

DEGREE, PIXEL, SIGMA = 64, 256, 64  # steps per degree, per pixel of a translation and per pixel of a blur
LEVEL_BITS, NORMAL_BITS, NORMAL_WORD_BITS = 16, 12, 10
TRIVIAL_BINS = 31
MEAN_COLOUR = (124, 116, 104)  # ImageNet's mean, with which timm fills

Fill = Grey | tuple[Grey, Grey, Grey]
Sampling = Literal["nearest", "bilinear"]
Level = Annotated[float, Field(ge=0.0)]


class ChoiceOp(Op):
    """An op that applies `layers` operations one after the other: `kind_0`, `amount_0`, `kind_1`, …"""

    @property
    def layers(self) -> int:
        return 1

    def draw_layer(self, words: Words, layer: int, size: Size) -> tuple[Integers, Integers]:
        """The kind and the amount of one layer, int64 [N]."""
        raise NotImplementedError

    def draw(self, words: Words, size: Size) -> dict[str, Integers]:
        drawn: dict[str, Integers] = {}
        for layer in range(self.layers):
            drawn[f"kind_{layer}"], drawn[f"amount_{layer}"] = self.draw_layer(words, layer, size)
        return drawn

    def neutral(self, count: int, size: Size) -> dict[str, Integers]:
        names = [f"{what}_{layer}" for layer in range(self.layers) for what in ("kind", "amount")]
        return {name: np.zeros(count, dtype=np.int64) for name in names}

    def rescaled(self, values: dict[str, Integers], drawn_for: Size, size: Size) -> dict[str, Integers]:
        changed = dict(values)
        for layer in range(self.layers):
            kind, amount = values[f"kind_{layer}"], values[f"amount_{layer}"]
            for name, axis in (("translate-x", 1), ("translate-y", 0), ("blur", 0)):
                scaled = (2 * amount * size[axis] + drawn_for[axis]) // (2 * drawn_for[axis])
                scaled = np.maximum(scaled, 1) if name == "blur" else scaled
                amount = np.where(kind == KIND[name], scaled, amount)
            changed[f"amount_{layer}"] = amount
        return changed


class RandPolicy(NamedTuple):
    """A RandAugment policy, with the meanings and defaults of timm's strings."""

    magnitude: int = 10
    layers: int = 2
    spread: float = 0.0  # of the magnitude: a standard deviation; above 100 it is uniform below `magnitude`
    highest: int = 10
    increasing: bool = False
    probability: float = 0.5


class RandAugment(ChoiceOp):
    """RandAugment as timm does it: `n` random operations of 15, each with probability `p`, at magnitude `m` of 10.

    Layer k takes the words of draw k: the operation, whether it is applied, its magnitude and its sign.

    Attributes:
        policy: timm's string, such as `rand-m9-mstd0.5-inc1`: m, n, mstd, mmax, inc and p.
        interpolation: of rotations, shears and translations.
        fill: the grey level or colour outside the picture.
    """

    op: Literal["rand-augment"] = "rand-augment"
    policy: str = "rand-m9-mstd0.5-inc1"
    interpolation: Sampling = "bilinear"
    fill: Fill = MEAN_COLOUR

    @field_validator("policy")
    @classmethod
    def _is_readable(cls, value: str) -> str:
        parse_policy(value)
        return value

    @property
    def layers(self) -> int:
        return parse_policy(self.policy).layers

    def draw_layer(self, words: Words, layer: int, size: Size) -> tuple[Integers, Integers]:
        policy = parse_policy(self.policy)
        choice_word, gate, magnitude_word, sign_word = words(layer)
        highest = policy.highest << LEVEL_BITS
        if policy.spread > 100:
            level = np.minimum(below(magnitude_word, (policy.magnitude << LEVEL_BITS) + 1), highest)
        else:
            deviation = normal_table()[magnitude_word >> 32 - NORMAL_WORD_BITS] * round(policy.spread * ONE)
            level = np.clip((policy.magnitude << LEVEL_BITS) + (deviation >> NORMAL_BITS), 0, highest)
        sign = 1 - 2 * (sign_word >> 31).astype(np.int64)
        amounts = _rand_amounts(level, sign, size, policy.increasing)
        choice = below(choice_word, len(amounts))
        applied = chance(gate, policy.probability)
        kinds = np.array([KIND[name] for name in amounts], dtype=np.int64)[choice]
        amount = np.stack(list(amounts.values()))[choice, np.arange(len(choice))]
        return kinds * applied, amount * applied


class TrivialAugmentWide(ChoiceOp):
    """One random operation of 14 at a random strength out of 31, as torchvision's TrivialAugmentWide.

    Draw 0: the operation, the strength, the sign.
    """

    op: Literal["trivial-augment-wide"] = "trivial-augment-wide"
    interpolation: Sampling = "nearest"
    fill: Fill = 0

    def draw_layer(self, words: Words, layer: int, size: Size) -> tuple[Integers, Integers]:
        choice_word, strength_word, sign_word, _ = words(0)
        strength, last = below(strength_word, TRIVIAL_BINS), TRIVIAL_BINS - 1
        sign = 1 - 2 * (sign_word >> 31).astype(np.int64)
        zero = np.zeros_like(strength)
        part = sign * ((2 * round(0.99 * ONE) * strength + last) // (2 * last))
        pixels = sign * PIXEL * (32 * strength // last)
        amounts = {
            "identity": zero,
            "shear-x": part,
            "shear-y": part,
            "translate-x": pixels,
            "translate-y": pixels,
            "rotate": sign * (135 * DEGREE * strength // last),
            "brightness": ONE + part,
            "colour": ONE + part,
            "contrast": ONE + part,
            "sharpness": ONE + part,
            "posterise": 8 - (12 * strength + last) // (2 * last),
            "solarise": -(-255 * (last - strength) // last),
            "auto-contrast": zero,
            "equalise": zero,
        }
        choice = below(choice_word, len(amounts))
        kinds = np.array([KIND[name] for name in amounts], dtype=np.int64)[choice]
        return kinds, np.stack(list(amounts.values()))[choice, np.arange(len(choice))]


class ThreeAugment(ChoiceOp):
    """3-Augment of DeiT III: greyscale, solarisation above 127 or a Gaussian blur of 0.1 to 2 pixels, one of the three.

    Draw 0: the operation, the blur. DeiT III adds a `colour-jitter` of 0.3.
    """

    op: Literal["three-augment"] = "three-augment"

    def draw_layer(self, words: Words, layer: int, size: Size) -> tuple[Integers, Integers]:
        choice_word, blur_word, _, _ = words(0)
        choice = below(choice_word, 3)
        first, last = round(0.1 * SIGMA), 2 * SIGMA
        blur = first + below(blur_word, last - first + 1)
        kinds = np.array([KIND["grey"], KIND["solarise"], KIND["blur"]], dtype=np.int64)[choice]
        return kinds, np.where(choice == 2, blur, np.where(choice == 1, 128, 0))


class Rotation(Op):
    """Rotate about the centre by up to `degrees` in both directions: `angle` in 1/64 degree. Word 0."""

    op: Literal["rotation"] = "rotation"
    degrees: Annotated[float, Field(ge=0.0, le=180.0)]
    interpolation: Sampling = "bilinear"
    fill: Fill = 0

    def draw(self, words: Words, size: Size) -> dict[str, Integers]:
        most = round(self.degrees * DEGREE)
        return {"angle": below(words(0)[0], 2 * most + 1) - most}

    def neutral(self, count: int, size: Size) -> dict[str, Integers]:
        return {"angle": np.zeros(count, dtype=np.int64)}


@functools.cache
def parse_policy(text: str) -> RandPolicy:
    """Read timm's string for RandAugment.

    Raises:
        ValueError: a section that timm does not know, or that is not supported here.
    """
    name, *sections = text.split("-")
    if name != "rand":
        raise ValueError(f"a RandAugment policy begins with 'rand', such as rand-m9-mstd0.5-inc1, not with {name!r}")
    found: dict[str, float] = {}
    for section in sections:
        match = re.fullmatch(r"(mstd|mmax|inc|m|n|p)([0-9]+(?:[.][0-9]+)?)", section)
        if match is None:
            raise ValueError(f"unknown section {section!r} of a RandAugment policy (known: m, n, mstd, mmax, inc, p)")
        if match[1] not in {"mstd", "p"} and "." in match[2]:
            raise ValueError(f"{match[1]} of a RandAugment policy is a whole number, not {match[2]}")
        if match[1] in found:
            raise ValueError(f"{match[1]} is there twice in a RandAugment policy")
        found[match[1]] = float(match[2])
    policy = RandPolicy(
        magnitude=int(found.get("m", 10)),
        layers=int(found.get("n", 2)),
        spread=found.get("mstd", 0.0),
        highest=int(found.get("mmax", 10)),
        increasing=bool(found.get("inc", 0)),
        probability=found.get("p", 0.5),
    )
    if not (1 <= policy.layers <= 16 and policy.magnitude <= 100 and 1 <= policy.highest <= 100):
        raise ValueError("a RandAugment policy has 1 to 16 operations (n), and magnitudes (m, mmax) of at most 100")
    if policy.probability > 1.0:
        raise ValueError("p of a RandAugment policy is a probability, at most 1")
    return policy


def _rand_amounts(level: Integers, sign: Integers, size: Size, increasing: bool) -> dict[str, Integers]:
    """The amount of each operation of RandAugment at a level in 1/65536, in timm's order."""
    zero, ten = np.zeros_like(level), 10 << LEVEL_BITS
    posterise, solarise = np.minimum(4 * level // ten, 8), np.minimum(256, 256 * level // ten)
    least = round(0.1 * ONE)
    if increasing:
        posterise, solarise = np.maximum(4 - posterise, 0), 256 - solarise
        factor = np.maximum(ONE + sign * ((9 * level + 50) // 100), least)
    else:
        factor = (18 * level + 50) // 100 + least
    shear = sign * ((3 * level + 50) // 100)
    height, width = size

    def shift(length: int) -> Integers:
        """0.45 of a length at level 10."""
        return sign * ((45 * PIXEL * length * level + 50 * ten) // (100 * ten))

    return {
        "auto-contrast": zero,
        "equalise": zero,
        "invert": zero,
        "rotate": sign * ((2 * 30 * DEGREE * level + ten) // (2 * ten)),
        "posterise": posterise,
        "solarise": solarise,
        "solarise-add": np.minimum(128, 110 * level // ten),
        "colour": factor,
        "contrast": factor,
        "brightness": factor,
        "sharpness": factor,
        "shear-x": shear,
        "shear-y": shear,
        "translate-x": shift(width),
        "translate-y": shift(height),
    }


@functools.cache
def normal_table() -> Integers:
    """1024 equally likely values of a standard normal variable, in 1/4096.

    No entry lies within 10⁻⁵ of a rounding boundary (a test checks this), and mathematics libraries differ by far less.
    """
    count = 1 << NORMAL_WORD_BITS
    quantile = NormalDist().inv_cdf
    values = [round(quantile((k + 0.5) / count) * (1 << NORMAL_BITS)) for k in range(count)]
    return np.array(values, dtype=np.int64)
