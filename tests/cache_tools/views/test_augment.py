"""Operations of RandAugment, TrivialAugment and 3-Augment: what they draw, and their pixels against torchvision's."""

import math
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cache_tools.views import ColourJitter, RandAugment, ViewRecipe, augment_pixels
from cache_tools.views.augment import KIND, KINDS, normal_table, parse_policy
from tests.cache_tools.views.test_pixels import noise, photos
from tests.support.pictures import photographs

FILL = (124, 116, 104)


def theirs(name: str, image: Any, amount: int, sampling: str, fill: Any) -> Any:
    """torchvision's function of the same parameters for one image uint8 [3, H, W]."""
    mode = {"nearest": InterpolationMode.NEAREST, "bilinear": InterpolationMode.BILINEAR}[sampling]
    geometry = {"interpolation": mode, "fill": list(fill)}

    def affine(shift: Any = (0, 0), shear: Any = (0.0, 0.0), **more: Any) -> Any:
        return F.affine(image, angle=0.0, translate=list(shift), scale=1.0, shear=list(shear), **geometry, **more)

    degrees = math.degrees(math.atan(amount / 65_536))
    functions: dict[str, Any] = {
        "identity": lambda: image,
        "auto-contrast": lambda: F.autocontrast(image),
        "equalise": lambda: F.equalize(image),
        "invert": lambda: F.invert(image),
        "rotate": lambda: F.rotate(image, amount / 64, **geometry),
        "posterise": lambda: F.posterize(image, amount),
        "solarise": lambda: image if amount > 255 else F.solarize(image, amount),
        "solarise-add": lambda: torch.where(image < 128, (image.int() + amount).clamp(max=255).to(torch.uint8), image),
        "colour": lambda: F.adjust_saturation(image, amount / 65_536),
        "contrast": lambda: F.adjust_contrast(image, amount / 65_536),
        "brightness": lambda: F.adjust_brightness(image, amount / 65_536),
        "sharpness": lambda: F.adjust_sharpness(image, amount / 65_536),
        "shear-x": lambda: affine(shear=(degrees, 0.0), center=[0, 0]),
        "shear-y": lambda: affine(shear=(0.0, degrees), center=[0, 0]),
        "translate-x": lambda: affine(shift=(-amount / 256, 0)),
        "translate-y": lambda: affine(shift=(0, -amount / 256)),
        "grey": lambda: F.rgb_to_grayscale(image, 3),
        "blur": lambda: F.gaussian_blur(image, [2 * math.ceil(3 * amount / 64) + 1] * 2, [amount / 64] * 2),
    }
    return functions[name]()


AMOUNTS: dict[str, list[int]] = {
    "rotate": [0, 64, -64 * 17, 64 * 30 + 5, -64 * 135, 64 * 90 + 1],
    "posterise": [8, 4, 3, 1, 0],
    "solarise": [256, 128, 1, 0, 77],
    "solarise-add": [0, 55, 110, 128],
    "shear-x": [0, 19_661, -19_661, 64_881, -333],
    "shear-y": [0, 19_661, -19_661, 64_881, -333],
    "translate-x": [0, 256 * 7, -256 * 32, 100, -12_345],
    "translate-y": [0, 256 * 7, -256 * 32, 100, -12_345],
    "blur": [6, 32, 64, 100, 128],
}
FACTORS = [0, 655, 6_554, 40_000, 65_536, 90_000, 131_072, 130_417]
GEOMETRIC = {"rotate", "shear-x", "shear-y", "translate-x", "translate-y"}


@pytest.mark.medium
@pytest.mark.parametrize("sampling", ["nearest", "bilinear"])
@pytest.mark.parametrize("name", KINDS)
def test_every_operation_is_torchvisions_to_within_one_level(name: str, sampling: Any) -> None:
    if sampling == "nearest" and name not in GEOMETRIC:
        pytest.skip("only geometric operations sample")
    enhances = name in {"colour", "contrast", "brightness", "sharpness"}
    amounts = AMOUNTS.get(name, FACTORS if enhances else [0])
    largest, missed, total = 0, 0, 0
    for images in (photos(2, 41, 56), photographs(56, 41)):
        batch = images.repeat_interleave(len(amounts), 0)
        drawn = np.array(amounts * len(images), dtype=np.int64)
        kinds = np.full(len(drawn), KIND[name])
        op = RandAugment(policy="rand-n1", interpolation=sampling, fill=FILL)
        made = augment_pixels.change(batch, op, {"kind_0": kinds, "amount_0": drawn})
        assert made.dtype == torch.uint8
        expected = torch.stack(
            [theirs(name, image, int(a), sampling, FILL) for image, a in zip(batch, drawn, strict=True)]
        )
        difference = (made.int() - expected.int()).abs()
        missed += int((difference > 1).any(1).sum())
        largest, total = max(largest, int(difference.max())), total + difference[:, 0].numel()
    print(
        f"{name}{f' ({sampling})' if name in GEOMETRIC else ''}: largest difference {largest}, {missed} pixels above 1"
    )
    if sampling == "nearest" and name in GEOMETRIC:  # where a place is half way, float32 decides by its rounding
        assert missed <= 0.002 * total
    else:
        assert largest <= 1


def test_each_sample_gets_its_own_operation() -> None:
    """A batch of all kinds equals each image alone."""
    images = photos(2 * len(KINDS), 24, 20)
    kinds = np.arange(len(images)) % len(KINDS)
    amounts = np.array([AMOUNTS.get(KINDS[k], [50_000])[-1] for k in kinds])
    op = RandAugment(policy="rand-n2")
    values = {"kind_0": kinds, "amount_0": amounts, "kind_1": kinds[::-1].copy(), "amount_1": amounts[::-1].copy()}
    before = images.clone()
    made = augment_pixels.change(images, op, values)
    assert torch.equal(images, before)
    for i in range(len(images)):
        alone = augment_pixels.change(images[i : i + 1], op, {name: each[i : i + 1] for name, each in values.items()})
        assert torch.equal(made[i], alone[0])


@pytest.mark.parametrize("steps", [-512, -37, 0, 1, 100, 511])
def test_hue_is_torchvisions(steps: int) -> None:
    for images in (photos(3, 30, 31), photographs(31, 30)):
        made = augment_pixels.hue(images, np.full(len(images), steps))
        assert int((made.int() - F.adjust_hue(images, steps / 1024).int()).abs().max()) <= 1
        if steps == 0:
            assert torch.equal(made, images)


def test_colour_jitter_of_version_2_is_torchvisions_in_a_row() -> None:
    op = {"op": "colour-jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    images = photographs(31, 30)
    recipe = ViewRecipe(version=2, ops=[op])
    assert isinstance(recipe.ops[0], ColourJitter)
    drawn = {k.rsplit(".", 1)[1]: v for k, v in recipe.parameters(range(len(images)), 1, (30, 31)).items()}
    made = recipe.apply(images, range(len(images)), 1)
    for i, image in enumerate(images):
        expected = F.adjust_brightness(image, drawn["brightness"][i] / 65_536)
        expected = F.adjust_contrast(expected, drawn["contrast"][i] / 65_536)
        expected = F.adjust_saturation(expected, drawn["saturation"][i] / 65_536)
        expected = F.adjust_hue(expected, drawn["hue"][i] / 1024)
        difference = (made[i].int() - expected.int()).abs()
        assert float(difference.float().mean()) < 0.5
        assert int(difference.max()) <= 4  # each of the four steps adds its level, which the next one multiplies
    old = ViewRecipe(ops=[op])
    assert {k: v.tolist() for k, v in old.parameters([0], 1, (8, 8)).items()} == {
        k: v.tolist() for k, v in recipe.parameters([0], 1, (8, 8)).items()
    }


def test_rotation_turns_by_the_drawn_angle() -> None:
    recipe = ViewRecipe(ops=[{"op": "rotation", "degrees": 20, "fill": 9}])
    assert recipe.version == 2
    images = photos(40, 20, 24)
    angles = recipe.parameters(range(40), 1, (20, 24))["0.rotation.angle"]
    assert -64 * 20 <= angles.min() < -64 * 10 < 64 * 10 < angles.max() <= 64 * 20
    made = recipe.apply(images, range(40), 1)
    for image, angle, found in zip(images, angles.tolist(), made, strict=True):
        expected = F.rotate(image, angle / 64, interpolation=InterpolationMode.BILINEAR, fill=[9, 9, 9])
        assert int((found.int() - expected.int()).abs().max()) <= 1


def test_sines_and_weights_are_correctly_rounded() -> None:
    for angle in (*range(-64 * 180, 64 * 180, 997), 0, 64 * 45, 64 * 90, 64 * 180):
        sine, cosine = augment_pixels.sine_cosine(angle)
        assert abs(sine - 2**24 * math.sin(math.radians(angle / 64))) <= 0.5 + 1e-7
        assert abs(cosine - 2**24 * math.cos(math.radians(angle / 64))) <= 0.5 + 1e-7
    assert augment_pixels.sine_cosine(64 * 90) == (2**24, 0)
    for deviation in (1, 6, 64, 128, 640):
        weights = augment_pixels.blur_weights(deviation)
        exact = [math.exp(-0.5 * (64 * k / deviation) ** 2) for k in range(len(weights))]
        total = exact[0] + 2 * sum(exact[1:])
        assert weights[0] + 2 * sum(weights[1:]) == 2**14
        for weight, part in zip(weights[1:], exact[1:], strict=True):
            assert abs(weight - 2**14 * part / total) <= 0.5 + 1e-6


def test_no_entry_of_the_normal_table_is_near_a_rounding_boundary() -> None:
    exact = [NormalDist().inv_cdf((k + 0.5) / 1024) * 4096 for k in range(1024)]
    assert min(abs(value - math.floor(value) - 0.5) for value in exact) > 1e-5
    table = normal_table()
    assert table.tolist() == [round(value) for value in exact]
    assert abs(float((table / 4096).std()) - 1) < 0.01


def test_policies_are_read_as_timm_reads_them() -> None:
    assert parse_policy("rand-m9-mstd0.5-inc1") == (9, 2, 0.5, 10, True, 0.5)
    assert parse_policy("rand") == (10, 2, 0.0, 10, False, 0.5)
    assert parse_policy("rand-n3-m5-mmax20-p1-inc0") == (5, 3, 0.0, 20, False, 1.0)
    assert parse_policy("rand-m7-mstd101").spread > 100


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("augmix-m3", "begins with 'rand'"),
        ("rand-m9-tweights", "unknown section 'tweights'"),
        ("rand-m9-", "unknown section ''"),
        ("rand-m9.5", "whole number"),
        ("rand-m9-m8", "twice"),
        ("rand-n0", "1 to 16"),
        ("rand-p1.5", "at most 1"),
        ("rand-m-3", "unknown section 'm'"),
    ],
)
def test_policies_that_cannot_be_read_are_refused(policy: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ViewRecipe(ops=[{"op": "rand-augment", "policy": policy}])


def drawn_kinds(op: Any, count: int = 20_000, size: Any = (100, 200)) -> dict[str, Any]:
    drawn = ViewRecipe(ops=[op]).parameters(range(count), 1, size)
    return {name.rsplit(".", 1)[1]: values for name, values in drawn.items()}


@pytest.mark.parametrize("increasing", [0, 1])
def test_rand_augment_draws_timms_arguments(increasing: int) -> None:
    """At a fixed magnitude each operation has timm's argument, with both signs, and half of the layers do nothing."""
    from timm.data import auto_augment

    names = auto_augment._RAND_INCREASING_TRANSFORMS if increasing else auto_augment._RAND_TRANSFORMS
    drawn = drawn_kinds({"op": "rand-augment", "policy": f"rand-m7-n3-inc{increasing}"})
    own = ["auto-contrast", "equalise", "invert", "rotate", "posterise", "solarise", "solarise-add", "colour"]
    own += ["contrast", "brightness", "sharpness", "shear-x", "shear-y", "translate-x", "translate-y"]
    units = {"rotate": 64, "posterise": 1, "solarise": 1, "solarise-add": 1}
    units |= {"translate-x": 256 * 200, "translate-y": 256 * 100}
    for layer in range(3):
        kind, amount = drawn[f"kind_{layer}"], drawn[f"amount_{layer}"]
        assert abs((kind == 0).mean() - 0.5) < 0.02
        for ours, name in zip(own, names, strict=True):
            chosen = kind == KIND[ours]
            assert abs(chosen.mean() - 1 / 30) < 0.006
            level_to_argument = auto_augment.LEVEL_TO_ARG[name]
            if level_to_argument is None:
                continue
            expected = {float(level_to_argument(7.0, {})[0]) * units.get(ours, 65_536) for _ in range(60)}
            found = set(amount[chosen].tolist())
            assert len(found) == len(expected)
            assert all(abs(a - b) <= 1 for a, b in zip(sorted(found), sorted(expected), strict=True))


def test_magnitudes_are_normal_or_uniform() -> None:
    normal = drawn_kinds({"op": "rand-augment", "policy": "rand-m5-n1-p1-mstd0.5"}, 60_000)
    turns = np.abs(normal["amount_0"][normal["kind_0"] == KIND["rotate"]]) / (3 * 64)
    assert abs(turns.mean() - 5) < 0.05
    assert abs(turns.std() - 0.5) < 0.03
    uniform = drawn_kinds({"op": "rand-augment", "policy": "rand-m8-n1-p1-mstd101"}, 60_000)
    turns = np.abs(uniform["amount_0"][uniform["kind_0"] == KIND["rotate"]]) / (3 * 64)
    assert abs(turns.mean() - 4) < 0.15
    assert turns.max() <= 8
    clipped = drawn_kinds({"op": "rand-augment", "policy": "rand-m10-n1-p1-mstd3"})
    assert np.abs(clipped["amount_0"][clipped["kind_0"] == KIND["rotate"]]).max() == 30 * 64


def test_trivial_augment_draws_torchvisions_strengths() -> None:
    from torchvision.transforms.v2 import TrivialAugmentWide

    names = ["identity", "shear-x", "shear-y", "translate-x", "translate-y", "rotate", "brightness", "colour"]
    names += ["contrast", "sharpness", "posterise", "solarise", "auto-contrast", "equalise"]
    scales = {"translate-x": 256, "translate-y": 256, "rotate": 64, "posterise": 1, "solarise": 255}
    drawn = drawn_kinds({"op": "trivial-augment-wide"}, 60_000)
    for name, (strengths, signed) in zip(names, TrivialAugmentWide._AUGMENTATION_SPACE.values(), strict=True):
        chosen = drawn["amount_0"][drawn["kind_0"] == KIND[name]]
        assert abs(len(chosen) - 60_000 / 14) < 300
        values = strengths(31, 100, 200)
        if values is None:
            assert set(chosen.tolist()) == {0}
            continue
        scale, shift = (
            scales.get(name, 65_536),
            65_536 if name in {"brightness", "colour", "contrast", "sharpness"} else 0,
        )
        exact = [float(value) for value in values]
        if name.startswith("translate"):
            exact = [math.trunc(value + 1e-5) for value in exact]
        expected = {shift + sign * value * scale for value in exact for sign in ((1, -1) if signed else (1,))}
        found = sorted(set(chosen.tolist()))
        assert max(min(abs(a - b) for b in expected) for a in found) <= 1
        assert len(found) == len({round(value) for value in expected})


def test_three_augment_draws_one_of_three() -> None:
    drawn = drawn_kinds("three-augment")
    shares = np.bincount(drawn["kind_0"], minlength=len(KINDS)) / 20_000
    for name in ("grey", "solarise", "blur"):
        assert abs(shares[KIND[name]] - 1 / 3) < 0.015
    blurs = drawn["amount_0"][drawn["kind_0"] == KIND["blur"]]
    assert set(blurs.tolist()) == set(range(6, 129))
    assert set(drawn["amount_0"][drawn["kind_0"] == KIND["solarise"]].tolist()) == {128}


def test_a_clean_view_has_no_operation() -> None:
    ops = ["rand-augment", "trivial-augment-wide", "three-augment", {"op": "rotation", "degrees": 30}]
    recipe = ViewRecipe(clean_first=True, ops=ops)
    images = photos(4, 16, 16)
    assert torch.equal(recipe.apply(images, range(4), 0), images)
    assert not torch.equal(recipe.apply(images, range(4), 1), images)


def test_augmentations_are_pinned() -> None:
    """A change here breaks every cache of version 2: it needs a new version of ViewRecipe."""
    ops = ["rand-augment", "trivial-augment-wide", "three-augment", {"op": "rotation", "degrees": 30}]
    recipe = ViewRecipe(base_seed=5, ops=ops)
    from cache_tools.alignment import pixel_digest

    assert recipe.parameter_digest(range(1000), 3, (224, 224)) == PINNED_DIGEST
    assert pixel_digest(recipe.apply(noise(64, 30), range(64), 3)) == PINNED_PIXELS


PINNED_DIGEST = 13641628492965904413
PINNED_PIXELS = "6b7ed8f9a44cab1e6008548973921a93"


def test_exponentials_are_exact() -> None:
    for over, under in ((0, 1), (1, 2), (7, 3), (50, 1)):
        value = Fraction(augment_pixels._exponential(over, under), 2**64)
        assert abs(float(value) - math.exp(-over / under)) < 1e-15
