"""What the recipe argument of `train-student` may be: a folder of images, a recipe of `build-cache`, a run's recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cache_tools.config import Changes
from cache_tools.errors import CacheError, RecipeError
from cache_tools.images.recipe import DatasetRecipe
from tests.support import tiny_run
from train.cli import app
from train.recipe.loading import load_train_recipe

CE: dict[str, Any] = {"loss": {"kind": "ce"}}
BUILD: dict[str, Any] = {
    "name": "mine",
    "dataset": {"name": "folder", "data_dir": "pictures", "image_size": 16, "test_split": "val"},
    "views": {"base_seed": 7, "clean_first": True, "ops": ["pad-crop", "flip"]},
    "num_views": 3,
    "teacher": {"name": "timm:resnet18"},
    "clip": {"name": "ViT-B-32", "weights": "openai"},
    "fusion": {"feature_dim": 64},
    "batch_size": 512,
    "preflight_samples": 0,
}


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    return tiny_run.write_pictures(tmp_path / "pictures", train=24, test=9)


def recipe_file(path: Path, **changes: Any) -> str:
    path.write_text(yaml.safe_dump(BUILD | changes))
    return str(path)


def test_a_folder_on_labels_alone(pictures: Path) -> None:
    recipe = load_train_recipe("pictures/", [], CE)
    assert (recipe.name, recipe.cache, recipe.student) == ("pictures", None, "timm:resnet18")
    dataset = recipe.own_dataset()
    assert (dataset.name, dataset.data_dir, dataset.split, dataset.test_split) == ("folder", pictures, "train", "test")
    assert recipe.own_views().output_size((256, 256)) == (224, 224)
    assert load_train_recipe("pictures", ["dataset.image_size=64"], CE).own_dataset().image_size == 64


def test_a_folder_with_a_cache_takes_the_images_from_there_and_the_rest_from_the_cache(pictures: Path) -> None:
    for recipe, cache in (
        (load_train_recipe("pictures"), "pictures"),
        (load_train_recipe("pictures", [], {"cache": "other"}), "other"),
    ):
        assert (recipe.cache, recipe.views) == (cache, None)
        assert recipe.dataset == Changes(data_dir="pictures")


@pytest.mark.parametrize("key", ["data_dir", "dataset.data_dir"])
def test_a_second_folder_is_refused(pictures: Path, key: str) -> None:
    with pytest.raises(RecipeError, match=f"given twice .*found {key}"):
        load_train_recipe("pictures", [f"{key}=elsewhere"], CE)


def test_a_folder_without_a_cache_says_what_to_do(pictures: Path) -> None:
    done = CliRunner().invoke(app, ["pictures", "--device", "cpu"])
    assert done.exit_code == 2
    assert "there is no cache of this folder (pictures); expected a cache named pictures" in done.stderr
    assert "build-cache pictures --teacher" in done.stderr
    assert "--loss ce" in done.stderr


@pytest.mark.medium
def test_a_folder_trains_from_the_cache_of_its_name(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    tiny_run.write_cache(tmp_path / "home" / "pictures-abc.zarr", pictures, name="pictures")
    options = ["--student", "resnet8", "--epochs", "1", "--device", "cpu", "--log", "none", "--out", "run"]
    done = CliRunner().invoke(app, ["pictures/", *options])
    assert done.exit_code == 0, done.stderr
    assert "training images in train, test images in test" in done.stderr
    assert "9 images of the test split" in done.stdout


def test_a_build_recipe_on_labels_alone_gives_its_dataset_and_views(tmp_path: Path) -> None:
    recipe = load_train_recipe(recipe_file(tmp_path / "mine.yaml"), [], CE)
    assert recipe.dataset == DatasetRecipe.model_validate(BUILD["dataset"])
    assert (recipe.own_views().base_seed, len(recipe.own_views().ops)) == (7, 2)
    assert (recipe.num_views, recipe.batch_size, recipe.cache) == (None, 64, None)


@pytest.mark.parametrize(
    ("changes", "cache"),
    [({}, "mine"), ({"out": "caches/x.zarr"}, "caches/x.zarr"), ({"out": "s3://bucket/caches"}, "mine")],
)
def test_a_build_recipe_with_targets_names_its_cache(tmp_path: Path, changes: dict[str, Any], cache: str) -> None:
    recipe = load_train_recipe(recipe_file(tmp_path / "mine.yaml", **changes))
    assert recipe.cache == cache
    assert isinstance(recipe.dataset, Changes)
    assert recipe.dataset.values == BUILD["dataset"]


def test_keys_that_no_recipe_has_are_refused_in_a_build_recipe_too(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe key 'veiws'.*'views'"):
        load_train_recipe(recipe_file(tmp_path / "mine.yaml", veiws=BUILD["views"]), [], CE)


def test_an_argument_that_is_nothing_names_the_kinds(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"no such recipe \(photoz/\); expected a YAML file, a folder of images, or"):
        load_train_recipe("photoz/")
