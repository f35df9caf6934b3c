"""View recipes and the integers they draw: the same in any order, any batch and any process."""

import json
import math
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cache_tools import views
from cache_tools.config import dump_yaml, validate
from cache_tools.errors import DataError, RecipeError
from cache_tools.philox import sample_words
from cache_tools.views import ops as view_ops
from cache_tools.views.recipe import ViewRecipe

EVERYTHING = ViewRecipe(
    base_seed=0x0123_4567_89AB_CDEF,
    ops=[
        {"op": "random-resized-crop", "size": [24, 20]},
        {"op": "pad-crop", "padding": 3, "fill": "reflect"},
        {"op": "flip"},
        {"op": "identity"},
        {"op": "colour-jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
        {"op": "random-erasing", "fill": "random"},
    ],
)
PINNED_DIGEST = 0x7064AD864F83ADE7
PINNED_FIRST_SAMPLE = {
    "0.random-resized-crop.top": 4,
    "0.random-resized-crop.left": 7,
    "0.random-resized-crop.height": 17,
    "0.random-resized-crop.width": 19,
    "1.pad-crop.top": 3,
    "1.pad-crop.left": 2,
    "2.flip.flipped": 1,
    "4.colour-jitter.brightness": 80602,
    "4.colour-jitter.contrast": 63472,
    "4.colour-jitter.saturation": 67047,
    "4.colour-jitter.hue": -37,
    "5.random-erasing.top": 3,
    "5.random-erasing.left": 1,
    "5.random-erasing.height": 10,
    "5.random-erasing.width": 6,
    "5.random-erasing.red": 63,
    "5.random-erasing.green": 159,
    "5.random-erasing.blue": 253,
}

INDEX = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=30)
VIEW = st.integers(0, 2**32 - 1)
SIDE = st.integers(1, 300)


@given(INDEX, VIEW, st.randoms(use_true_random=False))
def test_order_subset_and_batch_size_do_not_matter(index: Any, view: int, random: Any) -> None:
    whole = EVERYTHING.parameters(index, view, (32, 32))
    order = random.sample(range(len(index)), random.randint(1, len(index)))
    some = EVERYTHING.parameters([index[i] for i in order], view, (32, 32))
    assert some.keys() == whole.keys()
    for name, values in whole.items():
        assert values.dtype == np.int64
        assert values.shape == (len(index),)
        np.testing.assert_array_equal(values[order], some[name])
    alone = EVERYTHING.parameters(index[0], view, (32, 32))
    assert all(alone[name].tolist() == [values[0]] for name, values in whole.items())


def test_every_type_of_index_gives_the_same_parameters() -> None:
    expected = EVERYTHING.parameter_digest([3, 4, 5], 1, (32, 32))
    view: Any = np.int64(1)
    kinds: list[Any] = [
        range(3, 6),
        (3, 4, 5),
        np.arange(3, 6, dtype=np.uint8),
        torch.arange(3, 6),
        torch.tensor([3, 4, 5], dtype=torch.int32),
    ]
    assert {EVERYTHING.parameter_digest(kind, view, (32, 32)) for kind in kinds} == {expected}
    assert ViewRecipe().parameter_digest([], 0, (1, 1)) > 0


def test_another_process_without_torch_draws_the_same() -> None:
    code = (
        "import sys; from cache_tools.views import ViewRecipe; "
        "recipe = ViewRecipe.model_validate_json(sys.argv[1]); "
        "print(recipe.parameter_digest(range(99, -1, -1), 7, (32, 40))); "
        "assert not {'torch', 'torchvision'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, EVERYTHING.model_dump_json()], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == EVERYTHING.parameter_digest(range(99, -1, -1), 7, (32, 40))


def test_parameters_are_pinned() -> None:
    """A change here breaks every existing cache: it needs a new ViewRecipe version."""
    first = {name: int(values[0]) for name, values in EVERYTHING.parameters([12_345], 3, (32, 32)).items()}
    assert first == PINNED_FIRST_SAMPLE
    assert EVERYTHING.parameter_digest(range(1000), 3, (32, 32)) == PINNED_DIGEST


def test_the_digest_depends_on_every_input() -> None:
    def digest(recipe: Any = EVERYTHING, index: Any = (0, 1), view: int = 0, size: Any = (32, 32)) -> int:
        return recipe.parameter_digest(index, view, size)

    others = [
        digest(index=(1, 0)),
        digest(index=(0, 2)),
        digest(view=1),
        digest(size=(32, 33)),
        digest(recipe=EVERYTHING.model_copy(update={"base_seed": 1})),
        digest(recipe=EVERYTHING.model_copy(update={"ops": EVERYTHING.ops[:-1]})),
        digest(recipe=ViewRecipe()),
        digest(recipe=ViewRecipe(), index=(0, 2)),
        digest(recipe=ViewRecipe(), view=1),
    ]
    assert len({digest(), *others}) == len(others) + 1
    assert all(0 < value < 2**64 for value in others)


@given(st.integers(0, 40), INDEX, VIEW)
def test_pad_crop_and_flip_use_multiply_high_and_one_bit(padding: int, index: Any, view: int) -> None:
    recipe = ViewRecipe(base_seed=5, ops=[{"op": "pad-crop", "padding": padding}, "flip"])
    drawn = recipe.parameters(index, view, (32, 32))
    words = sample_words(5, np.array(index, dtype=np.uint64), view, 0).astype(object)
    assert drawn["0.pad-crop.top"].tolist() == [word * (2 * padding + 1) >> 32 for word in words[0]]
    assert drawn["0.pad-crop.left"].tolist() == [word * (2 * padding + 1) >> 32 for word in words[1]]
    gate = sample_words(5, np.array(index, dtype=np.uint64), view, 1 << 8)[0]
    assert drawn["1.flip.flipped"].tolist() == [1 - (int(word) >> 31) for word in gate]


def test_offsets_and_flips_are_uniform() -> None:
    """χ² over all 81 offsets and 2 directions, at the 0.1 % point."""
    drawn = ViewRecipe(ops=["pad-crop", "flip"]).parameters(range(81_000), 0, (32, 32))
    cell = (drawn["0.pad-crop.top"] * 9 + drawn["0.pad-crop.left"]) * 2 + drawn["1.flip.flipped"]
    counts = np.bincount(cell, minlength=162)
    assert len(counts) == 162
    assert ((counts - 500) ** 2 / 500).sum() < 221
    rare = ViewRecipe(ops=[{"op": "flip", "probability": 0.1}]).parameters(range(81_000), 0, (32, 32))["0.flip.flipped"]
    assert abs(rare.mean() - 0.1) < 4 * math.sqrt(0.09 / 81_000)


@given(st.floats(0, 1), st.floats(0, 0.5), VIEW)
def test_jitter_stays_within_its_strengths(strength: float, hue: float, view: int) -> None:
    strengths = {"brightness": strength, "contrast": strength / 2, "saturation": strength}
    drawn = ViewRecipe(ops=[{"op": "colour-jitter", "hue": hue} | strengths]).parameters(range(50), view, (8, 8))
    for name in ("brightness", "contrast", "saturation"):
        factors = drawn[f"0.colour-jitter.{name}"]
        assert np.abs(factors - 65_536).max() <= round(strengths[name] * 65_536)
    assert np.abs(drawn["0.colour-jitter.hue"]).max() <= round(hue * 1024)


def test_jitter_reaches_both_ends() -> None:
    op = {"op": "colour-jitter", "brightness": 1.0, "hue": 0.5}
    drawn = ViewRecipe(ops=[op]).parameters(range(50_000), 0, (8, 8))
    factors, turns = drawn["0.colour-jitter.brightness"], drawn["0.colour-jitter.hue"]
    assert factors.min() < 100
    assert factors.max() > 131_000
    assert abs(factors.mean() - 65_536) < 4 * 131_072 / math.sqrt(12 * 50_000)
    assert set(turns.tolist()) == set(range(-512, 513))


def reference_box(words: Any, size: Any, scale: Any, ratio: Any) -> Any:
    """`draw_box` for one sample on Python integers and rational numbers."""
    height, width = size
    table = [int(value) for value in view_ops.ratio_table()]
    allowed = [value for value in table if round(ratio[0] * 65_536) <= value <= round(ratio[1] * 65_536)]
    fits = min(height**2 * allowed[-1] // 65_536, width**2 * 65_536 // allowed[0])
    largest = max(1, min(round(scale[1] * height * width), fits))
    smallest = max(1, min(round(scale[0] * height * width), largest))
    area = smallest + (words[0] * (largest - smallest + 1) >> 32)
    least, most = area * 65_536 // height**2, width**2 * 65_536 // area
    first = next((k for k, value in enumerate(allowed) if value >= least), len(allowed) - 1)
    last = max([k for k, value in enumerate(allowed) if value <= most], default=first)
    chosen = allowed[first + (words[1] * (max(last, first) - first + 1) >> 32)]

    def root(value: Fraction) -> int:
        return (math.isqrt(4 * value.numerator // value.denominator) + 1) // 2

    box_width = min(max(root(Fraction(area * chosen, 65_536)), 1), width)
    box_height = min(max(root(Fraction(area * 65_536, chosen)), 1), height)
    return {
        "top": words[2] * (height - box_height + 1) >> 32,
        "left": words[3] * (width - box_width + 1) >> 32,
        "height": box_height,
        "width": box_width,
    }


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(SIDE, SIDE),
    st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(sorted),
    st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted).filter(lambda pair: pair[1] > 1.01 * pair[0]),
    st.integers(0, 1000),
)
def test_boxes_equal_the_reference_and_stay_inside(size: Any, scale: Any, ratio: Any, view: int) -> None:
    words = sample_words(1, np.arange(5, dtype=np.uint64), view, 0)
    drawn = view_ops.draw_box(words, size, tuple(scale), tuple(ratio))
    for i in range(5):
        box = {name: int(values[i]) for name, values in drawn.items()}
        assert box == reference_box([int(word) for word in words[:, i]], size, scale, ratio)
        assert 0 <= box["top"] <= box["top"] + box["height"] <= size[0]
        assert 0 <= box["left"] <= box["left"] + box["width"] <= size[1]
        assert min(box["height"], box["width"]) >= 1


def test_boxes_are_distributed_as_documented() -> None:
    op = {"op": "random-resized-crop", "size": 224}
    drawn = ViewRecipe(ops=[op]).parameters(range(20_000), 0, (224, 224))
    top, left, height, width = (drawn[f"0.random-resized-crop.{name}"] for name in ("top", "left", "height", "width"))
    share = height * width / 224**2
    counts, _ = np.histogram(share, bins=20, range=(0.08, 1.0))
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # uniform area; rounded sides blur the bins a little
    ratio = width / height
    assert 0.74 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.35
    small = np.log(ratio[share < 0.5])  # there every ratio fits: log-uniform
    assert abs(small.mean()) < 0.01
    assert abs(small.std() - math.log(4 / 3) / math.sqrt(3)) < 0.005
    for start, length in ((top, height), (left, width)):
        free = length < 200
        place = (start[free] + 0.5) / (225 - length[free])
        assert abs(place.mean() - 0.5) < 0.01
        assert abs(place.std() - 1 / math.sqrt(12)) < 0.01


def test_erasing_happens_with_its_probability() -> None:
    op = {"op": "random-erasing", "probability": 0.25, "scale": [0.1, 0.2], "ratio": [0.5, 2], "fill": [1, 2, 3]}
    drawn = ViewRecipe(ops=[op]).parameters(range(40_000), 0, (64, 64))
    area = drawn["0.random-erasing.height"] * drawn["0.random-erasing.width"]
    assert abs((area > 0).mean() - 0.25) < 0.01
    assert 0.09 < area[area > 0].min() / 4096 < area.max() / 4096 < 0.21
    assert [int(drawn[f"0.random-erasing.{c}"][0]) for c in ("red", "green", "blue")] == [1, 2, 3]
    coloured = ViewRecipe(ops=[op | {"fill": "random"}]).parameters(range(40_000), 0, (64, 64))
    assert set(coloured["0.random-erasing.blue"].tolist()) == set(range(256))
    np.testing.assert_array_equal(coloured["0.random-erasing.top"], drawn["0.random-erasing.top"])


def test_ratio_table_is_exact() -> None:
    table = view_ops.ratio_table()
    assert len(table) == 2561
    for k in (*range(256), *range(-1280, 1281, 97)):
        value = int(table[k + 1280])
        power = Fraction(2) ** (k + 16 * 256)
        assert value**256 <= power < (value + 1) ** 256


@given(st.lists(st.integers(0, 2**52 - 1), min_size=1), st.integers(0, 2**26 - 1))
def test_integer_square_roots_are_exact(values: Any, root: int) -> None:
    values = [*values, root * root, max(0, root * root - 1)]
    assert view_ops.integer_sqrt(np.array(values)).tolist() == [math.isqrt(value) for value in values]


def test_view_0_is_neutral_with_clean_first() -> None:
    clean = EVERYTHING.model_copy(update={"clean_first": True})
    drawn = clean.parameters(range(3), 0, (32, 40))
    assert {name.split(".", 1)[1]: values.tolist() for name, values in drawn.items() if name[0] in "012"} == {
        "random-resized-crop.top": [0, 0, 0],
        "random-resized-crop.left": [0, 0, 0],
        "random-resized-crop.height": [32, 32, 32],
        "random-resized-crop.width": [40, 40, 40],
        "pad-crop.top": [3, 3, 3],
        "pad-crop.left": [3, 3, 3],
        "flip.flipped": [0, 0, 0],
    }
    for view in (1, 2):
        for name, values in EVERYTHING.parameters(range(3), view, (32, 40)).items():
            np.testing.assert_array_equal(values, clean.parameters(range(3), view, (32, 40))[name])
    assert EVERYTHING.parameters(range(3), 0, (32, 40)).keys() == drawn.keys()


def test_seeds_views_and_positions_are_independent() -> None:
    def flips(seed: int, view: int, ops: list[Any]) -> Any:
        drawn = ViewRecipe(base_seed=seed, ops=ops).parameters(range(64), view, (8, 8))
        return tuple(list(drawn.values())[-1].tolist())

    different = {
        flips(0, 0, ["flip"]),
        flips(1, 0, ["flip"]),
        flips(2**64 - 1, 0, ["flip"]),
        flips(0, 1, ["flip"]),
        flips(0, 0, ["identity", "flip"]),
    }
    assert len(different) == 5


def test_recipes_round_trip() -> None:
    assert ViewRecipe.model_validate_json(EVERYTHING.model_dump_json()) == EVERYTHING
    assert ViewRecipe.model_validate(yaml.safe_load(dump_yaml(EVERYTHING))) == EVERYTHING
    assert json.loads(EVERYTHING.model_dump_json())["version"] == 1
    assert ViewRecipe(ops=["flip"]) == ViewRecipe(ops=[{"op": "flip", "probability": 0.5}])
    assert EVERYTHING.output_size((32, 40)) == (24, 20)
    assert ViewRecipe(ops=["pad-crop", "flip"]).output_size((32, 40)) == (32, 40)
    assert {type(op).__name__ for op in EVERYTHING.ops} <= set(views.__all__)


@pytest.mark.parametrize(
    "recipe",
    [
        {"version": 3},
        {"base_seed": -1},
        {"base_seed": 2**64},
        {"ops": ["spin"]},
        {"ops": [{"op": "flip", "probability": 1.5}]},
        {"ops": [{"op": "pad-crop", "padding": -1}]},
        {"ops": [{"op": "pad-crop", "fill": 256}]},
        {"ops": [{"op": "pad-crop", "fill": "wrap"}]},
        {"ops": [{"op": "random-resized-crop"}]},
        {"ops": [{"op": "random-resized-crop", "size": 0}]},
        {"ops": [{"op": "random-resized-crop", "size": 8, "scale": [0.5, 0.1]}]},
        {"ops": [{"op": "random-resized-crop", "size": 8, "ratio": [2, 1]}]},
        {"ops": [{"op": "random-erasing", "scale": [0, 0.5]}]},
        {"ops": [{"op": "colour-jitter", "hue": 0.6}]},
        {"ops": ["flip"] * 65},
    ],
)
def test_bad_recipes_are_refused(recipe: Any) -> None:
    with pytest.raises(ValidationError):
        ViewRecipe.model_validate(recipe)
    with pytest.raises(RecipeError):
        validate(ViewRecipe, recipe, where="a test")


def test_the_nearest_key_is_suggested_for_a_misspelt_one() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'padding'"):
        validate(ViewRecipe, {"ops": [{"op": "pad-crop", "pading": 2}]}, where="a test")


@pytest.mark.parametrize("index", [[-1], [2**63], [0.5], [[1, 2]], "ab", None, [[1], [2, 3]], [True]])
def test_bad_indices_are_refused(index: Any) -> None:
    with pytest.raises(DataError, match="ind"):
        ViewRecipe(ops=["flip"]).parameters(index, 0, (8, 8))


@pytest.mark.parametrize("view", [-1, 2**32, 0.5, "0", None])
def test_bad_views_are_refused(view: Any) -> None:
    with pytest.raises(DataError, match="view"):
        ViewRecipe(ops=["flip"]).parameters([0], view, (8, 8))


def test_ops_that_cannot_work_on_the_images_are_refused() -> None:
    recipe = ViewRecipe(
        ops=[{"op": "random-resized-crop", "size": 4}, {"op": "pad-crop", "padding": 4, "fill": "reflect"}]
    )
    for call in (recipe.output_size, lambda size: recipe.parameters([0], 0, size)):
        with pytest.raises(RecipeError, match="padding below 4"):
            call((32, 32))
    for size in ((0, 5), (5, 20_000)):
        with pytest.raises(RecipeError, match="sides of 1 to 16384"):
            ViewRecipe(ops=["flip"]).parameters([0], 0, size)
