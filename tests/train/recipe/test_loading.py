"""Training recipes as they are loaded: the built-in ones, files, and the settings on top."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cache_tools.config import builtin_names, dump_yaml
from cache_tools.errors import RecipeError
from cache_tools.format.recipe import with_canvas
from cache_tools.images.recipe import DatasetRecipe
from pipeline.recipe import load_build_recipe
from train.recipe.loading import builtin_recipes, load_train_recipe
from train.sweep.options import read_sweep

PAIRS = (
    "cifar100-resnet32x4-resnet8x4",
    "cifar100-resnet32x4-shufflev2",
    "cifar100-vgg13-mobilenetv2",
    "cifar100-vgg13-vgg8",
    "cifar100-wrn40-2-wrn16-2",
    "cifar100-wrn40-2-wrn40-1",
)
NAMES = ("cifar100", *PAIRS, "digits", "fashion-mnist", "imagenet-1k", "imagenet-1k-fast")


def test_built_in_recipes() -> None:
    assert tuple(builtin_names(builtin_recipes())) == NAMES
    paper = load_train_recipe("cifar100")
    assert (paper.student, paper.epochs, paper.batch_size) == ("resnet8x4", 240, 64)
    assert (paper.optimiser.learning_rate, paper.optimiser.weight_decay) == (0.05, 5e-4)
    assert paper.schedule.milestones == (150, 180, 210)
    assert (paper.loss.distill_weight, paper.loss.temperature, paper.loss.feature_weight) == (3.0, 3.0, 0.8)
    assert load_train_recipe("digits").compare_with_labels


@pytest.mark.parametrize("name", NAMES)
def test_a_run_on_labels_alone_has_the_views_of_the_cache(name: str) -> None:
    cache = load_train_recipe(name).cache
    assert cache is not None
    build = load_build_recipe(cache)
    assert cache == build.name
    train = load_train_recipe(name, [], {"loss": {"kind": "ce"}})
    assert isinstance(train.dataset, DatasetRecipe)
    assert with_canvas(train.dataset, train.own_views()) == build.dataset
    assert build.views.seen_by("student").crop_size == train.own_views().crop_size
    assert train.own_views() == build.views.model_copy(update={"sizes": train.own_views().sizes})


@pytest.mark.parametrize("name", NAMES)
def test_a_shown_recipe_reads_back_as_the_same(name: str, tmp_path: Path) -> None:
    recipe = load_train_recipe(name, ["epochs=7", "loss.temperature=2.5"])
    (tmp_path / "shown.yaml").write_text(dump_yaml(recipe))
    assert load_train_recipe(str(tmp_path / "shown.yaml")) == recipe
    assert (recipe.epochs, recipe.loss.temperature) == (7, 2.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epoch": 3}, "unknown recipe key 'epoch'.*'epochs'"),
        ({"optimiser": {"learning_rat": 1}}, "optimiser.learning_rat.*learning_rate"),
        ({"cache": None}, r"learns from a cache, and none is named .*--loss ce"),
        ({"cache": None, "loss": {"kind": "bce"}}, r"learns from a cache, and none is named .*--loss bce-labels"),
        ({"loss": {"kind": "ce"}, "dataset": None, "cache": None}, "needs a dataset of its own"),
        ({"optimiser": {"name": "adamw", "nesterov": True}}, "nesterov"),
        ({"schedule": {"name": "multistep"}}, "needs milestones"),
        ({"schedule": {"name": "multistep", "milestones": [3, 2]}}, "must rise"),
        ({"schedule": {"warmup_epochs": 11}}, "warm-up is longer than the run"),
        ({"epochs": 0}, "'epochs'"),
        ({"seed": -1}, "'seed'"),
        ({"ema_decay": 1.0}, "'ema_decay'"),
        ({"optimiser": {"accumulate": 0}}, "'optimiser.accumulate'"),
        ({"optimiser": {"clip_grad_norm": 0}}, "'optimiser.clip_grad_norm'"),
        ({"loss": {"label_smoothing": 1.0}}, "'loss.label_smoothing'"),
        ({"precision": "float8"}, "'precision'"),
    ],
)
def test_an_impossible_recipe_is_an_error_of_one_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    import yaml

    data = {"name": "mine", "cache": "c", "dataset": {"name": "digits"}, "epochs": 10} | changes
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(RecipeError, match=words) as caught:
        load_train_recipe(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("short", "full", "value"),
    [
        ("lr=0.3", ("optimiser", "learning_rate"), 0.3),
        ("temperature=7", ("loss", "temperature"), 7.0),
        (" weight_decay = 1e-3", ("optimiser", "weight_decay"), 1e-3),
        ("label_smoothing=0.1", ("loss", "label_smoothing"), 0.1),
    ],
)
def test_set_takes_the_short_names_of_the_grid(short: str, full: tuple[str, str], value: float) -> None:
    for recipe in ("digits", "cifar100"):
        loaded = load_train_recipe(recipe, [short])
        assert getattr(getattr(loaded, full[0]), full[1]) == value
    sweep = read_sweep(None, "digits", {}, [short], {})
    assert sweep.base[full[0]][full[1]] == value


def test_recipes_and_the_command_line_load_without_torch() -> None:
    code = (
        "import sys, train.cli, train.recipe.loading; train.recipe.loading.load_train_recipe('digits');"
        "print([m for m in ('torch', 'timm', 'zarr', 'matplotlib', 'polars', 'sklearn') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["epochs=-1"], {}, r"bad value for 'epochs' \(--set epochs=-1\)"),
        ([], {"batch_size": 0}, r"bad value for 'batch_size' \(--batch-size\)"),
        (
            ["teacher_weight=0.5"],
            {},
            r"unknown recipe key 'teacher_weight' \(--set teacher_weight=0\.5\).*did you mean 'fusion\.teacher_",
        ),
        (["learning_rate=0.5"], {}, r"did you mean 'optimiser\.learning_rate'\?"),
        (["warmup_epochs=2"], {}, r"'loss\.warmup_epochs' or 'schedule\.warmup_epochs'\?"),
    ],
)
def test_a_bad_option_is_not_blamed_on_the_recipe(
    tmp_path: Path, overrides: list[str], options: dict[str, Any], message: str
) -> None:
    file = tmp_path / "own.yaml"
    text = dump_yaml(load_train_recipe("digits"))
    file.write_text(text)
    with pytest.raises(RecipeError, match=f"(?i){message}"):
        load_train_recipe(str(file), overrides, options)
    file.write_text(re.sub(r"(?m)^epochs: .*$", "epochs: -2", text))
    with pytest.raises(RecipeError, match=r"bad value for 'epochs' \(.*own\.yaml\)"):
        load_train_recipe(str(file), ["seed=3"])
