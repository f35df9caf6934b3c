"""Which operations of ml-dr's views ours repeat bit for bit, and which they do not (docs/exchange.md has the table).

ml-dr stores boxes, flips and RandAugment's operations, which torchvision applies to Pillow images.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import skimage.data
import torch
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

from cache_tools.views import RandAugment as OurRandAugment
from cache_tools.views import pixels
from cache_tools.views.augment import DEGREE, KIND, PIXEL
from cache_tools.views.ops import ONE

pytestmark = pytest.mark.medium

SIZE, MAGNITUDE = 224, 9
DOCUMENT = Path(__file__).parents[3] / "docs/exchange.md"
FACTORS = {"Brightness": "brightness", "Color": "colour", "Contrast": "contrast", "Sharpness": "sharpness"}
OTHERS = {
    "Identity": ("identity", 1),
    "ShearX": ("shear-x", ONE),
    "ShearY": ("shear-y", ONE),
    "TranslateX": ("translate-x", -PIXEL),  # torchvision moves the other way
    "TranslateY": ("translate-y", -PIXEL),
    "Rotate": ("rotate", DEGREE),
    "Posterize": ("posterise", 1),
    "Solarize": ("solarise", 1),
    "AutoContrast": ("auto-contrast", 1),
    "Equalize": ("equalise", 1),
}
DIFFERENT = {"crop and resize", "Rotate", "Color", "Contrast", "AutoContrast"}


def test_operations_that_differ_are_those_of_the_document() -> None:
    ours, theirs, crops = cropped()
    found = {"crop and resize": difference(ours, theirs)}
    images = torch.from_numpy(theirs).permute(0, 3, 1, 2).contiguous()
    for name, (magnitudes, _) in RandAugment()._augmentation_space(31, (SIZE, SIZE)).items():
        strength = float(magnitudes[MAGNITUDE]) if magnitudes.ndim else 0.0
        applied = [_apply_op(crop, name, strength, InterpolationMode.NEAREST, None) for crop in crops]
        kind, amount = our_operation(name, strength)
        values = {
            "0.rand-augment.kind_0": np.full(len(images), KIND[kind]),
            "0.rand-augment.amount_0": np.full(len(images), amount),
        }
        ops = (OurRandAugment(policy="rand-m9-n1", interpolation="nearest", fill=0),)
        got = pixels.apply(ops, values, (SIZE, SIZE), images, 2).permute(0, 2, 3, 1).numpy()
        found[name] = difference(got, np.stack([np.asarray(each) for each in applied]))
    assert {name for name, (share, _) in found.items() if share} == DIFFERENT, found
    for name, (share, largest) in found.items():
        assert largest <= 1 or name == "Rotate", name
        assert share < 0.2, name
    rows = re.findall(r"^\| (.+?) \| (bit for bit|differs in .+?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    said = {name: what for row, what in rows for name in row.split(", ")}
    assert {name for name, what in said.items() if what != "bit for bit"} == DIFFERENT
    assert set(found) <= set(said)


def cropped() -> tuple[np.ndarray, np.ndarray, list[PIL.Image.Image]]:
    """Random boxes of photos at the size of a view: ours, torchvision's, and these as Pillow images."""
    generator = np.random.default_rng(0)
    names = ("astronaut", "chelsea", "coffee", "rocket")
    photos = [np.ascontiguousarray(getattr(skimage.data, name)()) for name in names]
    ours, crops = [], []
    for number in range(12):
        photo = photos[number % len(photos)]
        height, width = (int(generator.integers(60, side)) for side in photo.shape[:2])
        top = int(generator.integers(0, photo.shape[0] - height + 1))
        left = int(generator.integers(0, photo.shape[1] - width + 1))
        box = {"top": top, "left": left, "height": height, "width": width}
        picture = torch.from_numpy(photo).permute(2, 0, 1)
        arrays = {name: np.array([value]) for name, value in box.items()}
        ours.append(pixels.crop([picture], arrays, (SIZE, SIZE), "bilinear")[0].permute(1, 2, 0).numpy())
        crops.append(F.resized_crop(PIL.Image.fromarray(photo), top, left, height, width, [SIZE, SIZE]))
    return np.stack(ours), np.stack([np.asarray(crop) for crop in crops]), crops


def our_operation(name: str, strength: float) -> tuple[str, int]:
    if name in FACTORS:
        return FACTORS[name], round((1 + strength) * ONE)
    kind, unit = OTHERS[name]
    return kind, int(np.ceil(strength)) if name == "Solarize" else round(strength * unit)


def difference(got: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """The share of values that differ, and the largest difference."""
    apart = np.abs(got.astype(int) - expected.astype(int))
    return float((apart > 0).mean()), int(apart.max())
