"""A cache of a Hugging Face data set has the targets of a cache of the same images in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_tools.errors import DataError, MismatchError
from cache_tools.images import check
from cache_tools.reader import TeacherCache
from pipeline.build.cache import build_cache
from tests.support import hf_files, tiny_build, tiny_run
from train.data import open_data
from train.recipe import TrainRecipe

pytestmark = pytest.mark.medium


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    check._memory.cache_clear()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny_build.prepare(tmp_path, train=30)
    tables = hf_files.folder_tables(tmp_path / "pictures")
    hf_files.save_to_disk(tables, tmp_path / "saved")
    hf_files.hub_files(tables, tmp_path / "hub")
    return tmp_path


def hf_recipe(root: Path, name: str, **changes: Any) -> Any:
    dataset = {"name": "hf", "data_dir": str(root / name), "image_size": tiny_run.SIDE}
    return tiny_build.recipe(root, dataset=dataset, out=root / f"{name}.zarr", **changes)


def test_targets_equal_those_of_the_folder(root: Path) -> None:
    build_cache(tiny_build.recipe(root))
    wanted = tiny_build.arrays_of(root / "cache.zarr")
    for name in ("saved", "hub"):
        build_cache(hf_recipe(root, name))
        assert tiny_build.arrays_of(root / f"{name}.zarr") == wanted
    prints = {TeacherCache.open(root / f"{name}.zarr").manifest.fingerprint for name in ("saved", "hub")}
    assert len(prints) == 1  # the data, not how its files are arranged


def test_training_opens_the_data_set_of_the_cache(root: Path) -> None:
    build_cache(hf_recipe(root, "hub"))
    recipe = TrainRecipe.model_validate({"name": "t", "cache": str(root / "hub.zarr"), "student": "resnet8"})
    data = open_data(recipe, torch.device("cpu"))
    assert (len(data.images), len(data.tests[0]), data.images.class_names) == (30, 21, ("blue", "green", "red"))
    assert data.dataset.title == "hub"
    (root / "hub").rename(root / "moved")
    with pytest.raises(DataError, match=r"no such folder .*hub"):
        open_data(recipe, torch.device("cpu"))
    moved = recipe.model_copy(update={"dataset": TrainRecipe.model_validate(
        {"name": "t", "student": "resnet8", "cache": "x", "dataset": {"data_dir": str(root / "moved")}}
    ).dataset})  # fmt: skip
    assert len(open_data(moved, torch.device("cpu")).images) == 30


def test_changed_rows_are_not_those_of_the_cache(root: Path) -> None:
    build_cache(hf_recipe(root, "saved"))
    tables = hf_files.folder_tables(root / "pictures")
    for file in sorted((root / "saved" / "train").iterdir()):
        file.unlink()
    (root / "saved" / "train").rmdir()
    changed = tables["train"].slice(0, 29)
    hf_files.save_one(changed, root / "saved" / "train", "train")
    recipe = TrainRecipe.model_validate({"name": "t", "cache": str(root / "saved.zarr"), "student": "resnet8"})
    with pytest.raises(MismatchError):
        open_data(recipe, torch.device("cpu"))


def test_damaged_rows_are_left_out_if_the_recipe_says_so(root: Path) -> None:
    tables = hf_files.folder_tables(root / "pictures")
    images = tables["train"]["image"].to_pylist()
    images[7]["bytes"] = images[7]["bytes"][:-30]
    column = hf_files.image_table(
        [image["bytes"] for image in images], tables["train"]["label"].to_pylist(), ["blue", "green", "red"]
    )
    hf_files.save_to_disk({"train": column, "test": tables["test"]}, root / "bad")
    with pytest.raises(DataError, match=r"1 damaged image .*train, row 7 \(7.png\)"):
        build_cache(hf_recipe(root, "bad", preflight_samples=0, num_views=1))
    recipe = hf_recipe(root, "bad", num_views=1)
    skipping = recipe.model_copy(
        update={"dataset": recipe.dataset.model_copy(update={"on_bad_image": "skip", "test_split": None})}
    )
    build_cache(skipping)
    cache = TeacherCache.open(root / "bad.zarr")
    assert cache.num_samples == 29
    assert np.isfinite(cache.load_view(0).logits(torch.arange(29)).numpy()).all()
