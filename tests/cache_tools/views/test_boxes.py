"""Boxes of version 2: torchvision's distribution, the exact rule, and pictures of every shape."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import ks_2samp
from torchvision.transforms import v2

from cache_tools.errors import DataError, RecipeError
from cache_tools.philox import sample_words
from cache_tools.views import RandomResizedCrop, ViewRecipe, boxes
from tests.support.turns import slow

CROP: dict[str, Any] = {"op": "random-resized-crop", "size": 224}
SIZES = [(224, 224), (375, 500), (1200, 300)]


def drawn_boxes(op: dict[str, Any], sizes: Any, count: int, view: int = 1, **fields: Any) -> dict[str, Any]:
    drawn = ViewRecipe(version=2, ops=[op], **fields).parameters(range(count), view, sizes)
    return {name.rsplit(".", 1)[1]: values for name, values in drawn.items()}


def figures(top: Any, left: Any, height: Any, width: Any, size: Any) -> dict[str, Any]:
    """What is compared: the area, the ratio, and the position of the centre."""
    return {
        "area": height * width / (size[0] * size[1]),
        "ratio": np.log(width / height),
        "vertical": (top + height / 2) / size[0],
        "horizontal": (left + width / 2) / size[1],
    }


@pytest.mark.medium
@pytest.mark.parametrize(("count", "bound"), [(2_500, 0.07), slow(100_000, 0.01)])
@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_boxes_have_the_distribution_of_torchvision(size: Any, count: int, bound: float) -> None:
    transform = v2.RandomResizedCrop(224)
    picture = torch.empty(3, *size, dtype=torch.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        params = [transform.make_params([picture]) for _ in range(count)]
    theirs = {name: np.array([each[name] for each in params]) for name in ("top", "left", "height", "width")}
    expected = figures(theirs["top"], theirs["left"], theirs["height"], theirs["width"], size)
    ours = drawn_boxes(CROP, size, count)
    found = figures(ours["top"], ours["left"], ours["height"], ours["width"], size)
    for name, values in found.items():
        distance = ks_2samp(values, expected[name]).statistic
        print(f"{size[0]}x{size[1]} {name}: D = {distance:.4f} over {count:,} draws")
        assert distance <= bound, name


def reference_box(words: Any, size: Any, scale: Any, ratio: Any) -> dict[str, int]:
    """`RandomResizedCrop.draw_boxes` of one picture on Python integers; `words(k)` are the words of draw k."""
    height, width = size
    first, last = boxes.exponents(tuple(ratio))
    lowest, highest = (height * width * round(end * 2**24) // 2**12 for end in scale)

    def root(value: Fraction) -> int:
        return (math.isqrt(4 * value.numerator // value.denominator) + 1) // 2

    for attempt in range(10):
        area_word, ratio_word = words(attempt // 2)[2 * (attempt % 2) :][:2]
        area = Fraction(lowest + (area_word * (highest - lowest + 1) >> 32), 2**12)
        drawn = Fraction(int(boxes.power_of_two(np.array([first + (ratio_word * (last - first + 1) >> 32)]))[0]), 2**16)
        wide, high = root(area * drawn), root(area / drawn)
        if 0 < wide <= width and 0 < high <= height:
            place = words(5)
            top, left = place[0] * (height - high + 1) >> 32, place[1] * (width - wide + 1) >> 32
            return {"top": top, "left": left, "height": high, "width": wide}
    low, high_ratio = (Fraction(round(end * 2**16), 2**16) for end in ratio)
    high, wide = height, width
    if Fraction(width, height) < low:
        high = max(1, min(height, math.floor(width / low + Fraction(1, 2))))
    elif Fraction(width, height) > high_ratio:
        wide = max(1, min(width, math.floor(height * high_ratio + Fraction(1, 2))))
    return {"top": (height - high) // 2, "left": (width - wide) // 2, "height": high, "width": wide}


SIDE = st.one_of(st.integers(1, 60), st.integers(1, 16_384), st.just(1 << 14))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=4),
    st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(sorted),
    st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(sorted),
    st.integers(0, 1000),
)
def test_boxes_equal_the_reference_and_stay_inside(sizes: Any, scale: Any, ratio: Any, view: int) -> None:
    op = {**CROP, "scale": scale, "ratio": ratio}
    drawn = drawn_boxes(op, np.array(sizes), len(sizes), view, base_seed=1)
    for i, size in enumerate(sizes):
        box = {name: int(values[i]) for name, values in drawn.items()}
        index = np.array([i], dtype=np.uint64)

        def words(draw: int, index: Any = index) -> list[int]:
            return [int(word) for word in sample_words(1, index, view, draw)[:, 0]]

        assert box == reference_box(words, size, scale, ratio)
        assert 0 <= box["top"] <= box["top"] + box["height"] <= size[0]
        assert 0 <= box["left"] <= box["left"] + box["width"] <= size[1]
        assert min(box["height"], box["width"]) >= 1


def test_a_box_does_not_depend_on_the_other_pictures() -> None:
    sizes = np.array([(224, 224), (30_000, 3), (1, 1), (375, 500), (9, 1000)])
    recipe = ViewRecipe(version=2, ops=[CROP])
    whole = recipe.parameters(range(5), 3, sizes)
    for i in (4, 1, 0):
        alone = recipe.parameters(i, 3, sizes[i : i + 1])
        assert {name: int(values[0]) for name, values in alone.items()} == {
            name: int(values[i]) for name, values in whole.items()
        }


def test_boxes_are_pinned() -> None:
    """A change here breaks every cache of version 2: it needs a new version of ViewRecipe."""
    recipe = ViewRecipe(version=2, base_seed=0x0123_4567_89AB_CDEF, ops=[CROP, "flip"])
    sizes = np.array([(224, 224), (375, 500), (1200, 300)])
    drawn = recipe.parameters([12_345, 0, 2**40], 3, sizes)
    assert {name: values.tolist() for name, values in drawn.items()} == PINNED
    assert recipe.parameter_digest(range(1000), 3, (256, 256)) == PINNED_DIGEST


PINNED = {
    "0.random-resized-crop.top": [52, 45, 826],
    "0.random-resized-crop.left": [0, 152, 3],
    "0.random-resized-crop.height": [119, 280, 281],
    "0.random-resized-crop.width": [134, 244, 297],
    "1.flip.flipped": [0, 1, 1],
}
PINNED_DIGEST = 0x954D7DDE99C41C57


def test_powers_of_two_are_exact() -> None:
    """Each is ⌊2^(k/65536) · 2¹⁶⌋ or one less; exact where k is a multiple of 65536."""
    exponents = np.array([*range(-5 * 65_536, 5 * 65_536, 9_973), -65_536, 0, 65_536])
    for k, value in zip(exponents.tolist(), boxes.power_of_two(exponents).tolist(), strict=True):
        power = 2.0 ** (k / 65_536) * 65_536
        assert power * (1 - 1e-12) - 2 < value <= power * (1 + 1e-12)
    assert boxes.power_of_two(np.array([-65_536, 0, 65_536])).tolist() == [32_768, 65_536, 131_072]
    assert boxes.exponents((1.0, 1.0)) == (0, 1)  # 2^(1/65536) is 65536 too, rounded down
    first, last = boxes.exponents((3 / 4, 4 / 3))
    assert abs(first - 65_536 * math.log2(3 / 4)) < 2
    assert abs(last - 65_536 * math.log2(4 / 3)) < 2


@pytest.mark.parametrize(
    ("size", "view", "resize", "box"),
    [
        ((256, 256), 224, 256, (16, 16, 224, 224)),
        ((375, 500), 224, 256, (23, 86, 328, 328)),
        ((500, 375), 224, None, (86, 23, 328, 328)),
        ((300, 900), [100, 300], 100, (0, 0, 300, 900)),
        ((300, 300), [100, 300], 100, (100, 0, 100, 300)),  # no wider box of this shape
        ((7, 7), 224, None, (0, 0, 6, 6)),
        ((30_000, 3), 224, 224, (14_998, 0, 3, 3)),
    ],
)
def test_resize_and_centre_crop_is_the_centre_of_the_picture(size: Any, view: Any, resize: Any, box: Any) -> None:
    drawn = drawn_boxes({"op": "resize-centre-crop", "size": view, "resize": resize}, size, 3)
    assert [tuple(int(values[i]) for values in drawn.values()) for i in range(3)] == [box] * 3


def test_a_clean_view_is_the_centre_that_students_are_tested_on() -> None:
    clean = drawn_boxes(CROP, (375, 500), 2, view=0, clean_first=True)
    centre = drawn_boxes({"op": "resize-centre-crop", "size": 224}, (375, 500), 2)
    for name, values in clean.items():
        np.testing.assert_array_equal(values, centre[name])
    later = drawn_boxes(CROP, (375, 500), 2, view=1, clean_first=True)
    np.testing.assert_array_equal(later["top"], drawn_boxes(CROP, (375, 500), 2, view=1)["top"])


def test_the_version_is_2_only_where_it_is_needed() -> None:
    assert ViewRecipe(ops=[CROP]).version == 1
    assert ViewRecipe(ops=["flip"]).version == 1
    for recipe in (
        {"ops": [{"op": "resize-centre-crop", "size": 8}]},
        {"ops": [{**CROP, "interpolation": "bicubic"}]},
        {"version": 2, "ops": [CROP]},
    ):
        made = ViewRecipe.model_validate(recipe)
        assert made.version == 2
        assert ViewRecipe.model_validate_json(made.model_dump_json()) == made
    assert "interpolation" not in RandomResizedCrop(size=8).model_dump(mode="json")
    assert ViewRecipe(ops=[CROP]).box_op is None
    assert ViewRecipe(version=2, ops=[CROP, "flip"]).output_size((375, 500)) == (224, 224)
    assert ViewRecipe(version=2, ops=["flip"]).output_size((32, 32)) == (32, 32)


@pytest.mark.parametrize(
    "recipe",
    [
        {"version": 1, "ops": [{"op": "resize-centre-crop", "size": 8}]},
        {"version": 1, "ops": [{**CROP, "interpolation": "bicubic"}]},
        {"version": 2, "ops": ["flip", CROP]},
        {"version": 2, "ops": [CROP, CROP]},
        {"ops": [{"op": "resize-centre-crop", "size": 224, "resize": 160}]},
        {"ops": [{"op": "resize-centre-crop", "size": 0}]},
    ],
)
def test_recipes_that_do_not_fit_their_version_are_refused(recipe: Any) -> None:
    with pytest.raises(ValidationError):
        ViewRecipe.model_validate(recipe)


def test_pictures_that_cannot_be_cropped_are_refused() -> None:
    recipe = ViewRecipe(version=2, ops=[CROP])
    with pytest.raises(RecipeError, match="at most 268,435,456 pixels"):
        recipe.parameters([0, 1], 0, np.array([(8, 8), (65_536, 65_536)]))
    with pytest.raises(RecipeError, match="found 0×5"):
        recipe.parameters([0], 0, (0, 5))
    with pytest.raises(DataError, match="one size for each picture"):
        recipe.parameters([0, 1], 0, np.array([(8, 8)]))
    for without in (ViewRecipe(ops=["flip"]), ViewRecipe(version=2, ops=["flip"]), ViewRecipe(ops=[CROP])):
        with pytest.raises(RecipeError, match="version 2 that start with a crop"):
            without.parameters([0, 1], 0, np.array([(8, 8), (8, 9)]))
