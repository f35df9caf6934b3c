"""From every source of image files to a student: the cache of its images is that of the same images in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.torch import load_file

from cache_tools.images import check, open_images
from cache_tools.images.pack import pack_images
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.integrity.images import check_images
from cache_tools.reader import TeacherCache
from pipeline.build.cache import build_cache
from tests.support import shards, tiny_build, tiny_run
from train.checkpoints import LAST
from train.recipe.loading import load_train_recipe
from train.run import train_student

pytestmark = pytest.mark.medium

COUNT, VIEWS = 12, 1


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    check._memory.cache_clear()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a teacher, the cache of the folder, and a student of it."""
    root = tiny_build.prepare(tmp_path_factory.mktemp("sources"), train=COUNT)
    build_cache(tiny_build.recipe(root, num_views=VIEWS))
    train(root, root / "run")
    return root


def train(root: Path, out: Path, *settings: str) -> None:
    """Train from the cache of the folder."""
    options = {"cache": str(root / "cache.zarr"), "out": out, "device": "cpu", "epochs": 1, "student": "resnet8"}
    train_student(load_train_recipe("digits", ["schedule.warmup_epochs=0", "batch_size=8", *settings], options))


def write_list(pictures: Path, place: Path) -> dict[str, Any]:
    files = sorted(pictures.glob("*/*/*.png"))
    rows = [(str(file), file.parts[-2], file.parts[-3]) for file in files]
    table = pl.DataFrame(rows, schema=["path", "label", "split"], orient="row")
    if place.suffix == ".csv":
        table.write_csv(place)
    else:
        table.write_parquet(place)
    return {"name": place.suffix.removeprefix("."), "data_dir": str(place)}


def write_shards(pictures: Path, folder: Path) -> dict[str, Any]:
    """Shards without an index, of which the labels are names in `.json` files."""
    for split in ("train", "test"):
        shards.write(pictures / split, folder / "shards", split, count=2, label="json")
    return {"name": "webdataset", "data_dir": str(folder / "shards")}


def write_pack(pictures: Path, folder: Path) -> dict[str, Any]:
    pack_images(pictures, folder / "pack")
    return {"name": "webdataset", "data_dir": str(folder / "pack")}


SOURCES: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "csv": lambda pictures, folder: write_list(pictures, folder / "list.csv"),
    "parquet": lambda pictures, folder: write_list(pictures, folder / "list.parquet"),
    "webdataset": write_shards,
    "pack": write_pack,
}


@pytest.mark.parametrize("source", SOURCES)
def test_build_train_and_verify(source: str, root: Path, tmp_path: Path) -> None:
    dataset = {**SOURCES[source](root / "pictures", tmp_path), "image_size": tiny_run.SIDE}
    build_cache(tiny_build.recipe(root, dataset=dataset, num_views=VIEWS, out=tmp_path / "cache.zarr"))
    assert tiny_build.arrays_of(tmp_path / "cache.zarr") == tiny_build.arrays_of(root / "cache.zarr")
    opened = open_images(DatasetRecipe.model_validate(dataset))
    wanted = open_images(tiny_run.dataset(root / "pictures"))
    assert np.array_equal(opened.load(slice(None)), wanted.load(slice(None)))
    cache = TeacherCache.open(tmp_path / "cache.zarr")
    report, _ = check_images(cache)
    assert (cache.recipe.dataset.name, report.problem, report.same_order) == (dataset["name"], None, True)
    # The cache of the folder, and these images: told by their files, or named.
    train(root, tmp_path / "run", f"data_dir={dataset['data_dir']}")
    assert outcome(tmp_path / "run") == outcome(root / "run")
    changes = [f"dataset.{key}={value}" for key, value in dataset.items()]
    named = load_train_recipe("digits", changes, {"cache": str(root / "cache.zarr")})
    of_folder = TeacherCache.open(root / "cache.zarr")
    assert named.cached_dataset(of_folder.manifest).name == dataset["name"]
    assert check_images(of_folder, Path(dataset["data_dir"]))[0].problem is None


def outcome(run: Path) -> tuple[dict[str, bytes], list[Any]]:
    """The weights of a student and its metrics."""
    weights = {name: tensor.numpy().tobytes() for name, tensor in load_file(run / LAST).items()}
    return weights, pl.read_parquet(run / "metrics.parquet").drop(tiny_run.TIMINGS).rows()
