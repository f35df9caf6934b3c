"""A folder of images in place of a recipe of `build-cache`."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cache_tools.errors import RecipeError
from pipeline.recipe import load_build_recipe
from tests.support import tiny_run
from tests.support.next_commands import parse


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tiny_run.write_pictures(tmp_path / "my photos", train=6, test=3)


def test_a_folder_is_a_recipe_that_lacks_networks(pictures: Path) -> None:
    recipe = load_build_recipe("my photos", ["num_views=2"], {"teacher": {"name": "runs/teacher"}})
    assert (recipe.name, recipe.num_views, recipe.teachers[0].name) == ("my-photos", 2, "runs/teacher")
    assert (recipe.dataset.data_dir, recipe.dataset.test_split) == (Path("my photos"), "test")
    assert (recipe.dataset.image_size, recipe.views.output_size((256, 256))) == (256, (224, 224))
    assert recipe.clips == ()
    with_clip = load_build_recipe("my photos/", [], {"clip.name": "local-dir:package:digits-clip"})
    assert (len(with_clip.teachers), len(with_clip.clips)) == (0, 1)
    with pytest.raises(RecipeError, match=r"needs a teacher, a CLIP or both \(my photos\)\..*--teacher"):
        load_build_recipe("my photos")


def test_a_folder_without_test_images_is_built_without_them(pictures: Path) -> None:
    recipe = load_build_recipe(str(pictures / "train"), [], {"teacher": {"name": "runs/teacher"}})
    assert (recipe.name, recipe.dataset.test_split) == ("train", None)


def test_a_folder_without_a_teacher_says_how_to_get_one(pictures: Path) -> None:
    with pytest.raises(RecipeError, match="this folder needs a teacher, a CLIP or both") as caught:
        load_build_recipe("my photos")
    command = "train-student 'my photos' --loss ce --out runs/teacher"
    assert f"Train a teacher with {command}, and give it here: --teacher runs/teacher." in str(caught.value)
    parse(shlex.split(command))


@pytest.mark.parametrize("typed", ["my photo", "my_photos", "./my fotos"])
def test_a_misspelt_folder_is_hinted_at(pictures: Path, typed: str) -> None:
    with pytest.raises(RecipeError, match=r"no such recipe.*Did you mean 'my photos/'"):
        load_build_recipe(typed)


def test_a_second_folder_is_refused(pictures: Path) -> None:
    with pytest.raises(RecipeError, match=r"given twice \(my photos\).*found dataset.data_dir"):
        load_build_recipe("my photos", [], {"dataset.data_dir": "elsewhere", "teacher": {"name": "x"}})


@pytest.mark.parametrize("setting", ["dataset.data_dir=/photos", "dataset.download=true"])
def test_a_place_for_a_source_that_has_none_is_refused(setting: str) -> None:
    with pytest.raises(RecipeError, match=r"digits (has no folder of files|cannot be downloaded)"):
        load_build_recipe("digits", [setting])
