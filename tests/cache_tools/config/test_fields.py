"""Fields of recipes have bounds: no boolean is a number, and no number asks for more than a machine can have."""

from __future__ import annotations

from typing import Any

import pytest

from cache_tools.errors import CacheError, RecipeError
from pipeline.recipe import BuildRecipe, load_build_recipe
from tests.support.turns import turns
from train.recipe.loading import load_train_recipe
from train.sweep.options import read_sweep
from train.sweep.recipe import SweepRecipe

NUMBERS = {
    "build": ["num_views", "batch_size", "block_rows", "preflight_samples", "fusion.teacher_weight",
              "fusion.feature_dim", "fusion.projection_seed", "fusion.clip_scale", "views.base_seed"],
    "train": ["epochs", "batch_size", "seed", "num_views", "label_fraction", "label_seed", "ema_decay",
              "evaluate_every", "checkpoint_every_minutes", "optimiser.learning_rate", "optimiser.weight_decay",
              "optimiser.momentum", "optimiser.clip_grad_norm", "optimiser.accumulate", "schedule.warmup_epochs",
              "loss.temperature", "loss.ce_weight", "loss.distill_weight", "loss.crd_dim", "loss.crd_negatives",
              "loss.label_smoothing"],
}  # fmt: skip
CASES = [(kind, key) for kind, keys in NUMBERS.items() for key in keys]
BAD = ["true", "no", ".nan", ".inf", "-.inf", "1e400", "-1", str(10**180), "[1]", "{a: 1}", "null x", "'\\0'"]


def load(kind: str, *overrides: str) -> Any:
    return (load_build_recipe if kind == "build" else load_train_recipe)("digits", overrides)


@pytest.mark.turns
@pytest.mark.parametrize(("kind", "key"), CASES)
def test_no_number_takes_another_value(kind: str, key: str) -> None:
    start = CASES.index((kind, key))  # in the short turn each key gets other values
    for value in [BAD[(start + place) % len(BAD)] for place in range(turns(2, len(BAD)))]:
        if key == "loss.label_smoothing" and value == "no":
            continue
        with pytest.raises(RecipeError) as caught:
            load(kind, f"{key}={value}")
        message = str(caught.value)
        assert key in message, (value, message)
        assert len(message) < 600


@pytest.mark.parametrize(
    ("kind", "override"),
    [("train", "epochs=1000000001"), ("train", "loss.crd_dim=100000"), ("build", "num_views=3000000"),
     ("build", "fusion.feature_dim=1000000"), ("train", f"name={'x' * 200}"), ("train", "out=''"),
     ("train", "data_dir=''"), ("build", "dataset.data_dir=''"), ("train", "label_fraction=1e-9"),
     ("build", "teacher.size=1000000"), ("build", "teacher.mean=[.nan, 0, 0]")],
)  # fmt: skip
def test_values_that_no_machine_can_use_are_refused(kind: str, override: str) -> None:
    with pytest.raises(RecipeError):
        load(kind, override)


@pytest.mark.parametrize("text", ["'\\0'", "'a\\0b'", '"\\uD800"'])
def test_text_without_characters_is_refused_wherever_it_is(text: str) -> None:
    for key in ("dataset.split", "teacher.name", "clip.templates", "out"):
        with pytest.raises(RecipeError):
            load("build", f"{key}={text.replace(chr(39), chr(34))}")


def sweep(**keys: Any) -> SweepRecipe:
    return read_sweep(None, "digits", {}, (), keys)


@pytest.mark.parametrize("seeds", [10**180, 10**6, True, 0, [1, True], [10**30], list(range(100_001)), 1.5, "x"])
def test_seeds_that_no_sweep_can_have_are_refused(seeds: Any) -> None:
    with pytest.raises(CacheError, match="seeds"):
        sweep(seeds=seeds)
    assert sweep(seeds=3).seed_numbers == (0, 1, 2)


def test_a_product_of_too_many_trials_is_refused_before_it_is_made() -> None:
    grid = {f"loss.{key}": [n / 100 for n in range(1, 101)] for key in ("temperature", "ce_weight", "distill_weight")}
    with pytest.raises(RecipeError, match="at most 100,000 trials; found 1,000,000"):
        sweep(grid=grid)


def test_recipes_of_before_keep_their_values() -> None:
    """The bounds are types of pydantic: what they let through is unchanged."""
    recipe = load_build_recipe("digits", ["fusion.clip_scale=2", "teacher.mean=[0, 0.5, 1]"])
    assert isinstance(recipe, BuildRecipe)
    assert (recipe.fusion.clip_scale, recipe.teachers[0].mean) == (2.0, (0.0, 0.5, 1.0))
