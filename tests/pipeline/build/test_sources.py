"""From every source of image files to a student: the cache of its images is that of the same images in a folder."""

from __future__ import annotations

import json
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
from cache_tools.storage import open_place
from pipeline.build.cache import build_cache
from tests.support import shards, tiny_build, tiny_run
from tests.support.kill_cases import Command, run
from tests.support.s3_server import new_bucket
from tests.support.turns import some
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


def write_food101(pictures: Path, folder: Path) -> dict[str, Any]:
    """The layout of torchvision's Food101; what is in a file counts, not its ending."""
    root = folder / "food-101"
    (root / "meta").mkdir(parents=True)
    for split in ("train", "test"):
        listed: dict[str, list[str]] = {}
        for file in sorted((pictures / split).glob("*/*.png")):
            name = f"{file.parent.name}/{split}-{file.stem}"
            listed.setdefault(file.parent.name, []).append(name)
            (root / "images" / file.parent.name).mkdir(parents=True, exist_ok=True)
            (root / "images" / f"{name}.jpg").write_bytes(file.read_bytes())
        (root / "meta" / f"{split}.json").write_text(json.dumps(listed))
    return {"name": "food101", "data_dir": str(folder)}


def write_own(pictures: Path, folder: Path) -> dict[str, Any]:
    (folder / "photos_of_mine.py").write_text(
        "from pathlib import Path\n"
        "NAMES = ('blue', 'green', 'red')\n"
        "def open_photos(recipe, split):\n"
        f"    files = sorted(Path({str(pictures)!r}, split).glob('*/*'))\n"
        "    return files, [NAMES.index(file.parent.name) for file in files], NAMES\n"
    )
    return {"name": "photos_of_mine:open_photos"}


# Told by their files: `--data-dir` alone makes them the images of a cache.
TOLD = {"csv", "parquet", "webdataset", "pack"}
SOURCES: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "csv": lambda pictures, folder: write_list(pictures, folder / "list.csv"),
    "parquet": lambda pictures, folder: write_list(pictures, folder / "list.parquet"),
    "webdataset": write_shards,
    "pack": write_pack,
    "food101": write_food101,
    "own": write_own,
}


@pytest.mark.parametrize("source", some(["csv", "pack", "own", "webdataset", "food101", "parquet"], 3))
def test_build_train_and_verify(source: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.syspath_prepend(tmp_path)
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
    changes = [f"dataset.{key}={value}" for key, value in dataset.items()]
    train(root, tmp_path / "run", *([f"data_dir={dataset['data_dir']}"] if source in TOLD else changes))
    assert outcome(tmp_path / "run") == outcome(root / "run")
    named = load_train_recipe("digits", changes, {"cache": str(root / "cache.zarr")})
    of_folder = TeacherCache.open(root / "cache.zarr")
    assert named.cached_dataset(of_folder.manifest).name == dataset["name"]
    if source in TOLD:
        assert check_images(of_folder, Path(dataset["data_dir"]))[0].problem is None


def test_a_pack_in_a_bucket_is_read_there(server: str, root: Path, tmp_path: Path) -> None:
    pack_images(root / "pictures", tmp_path / "pack")
    place = open_place(f"s3://{new_bucket()}/pack")
    for file in (tmp_path / "pack").iterdir():
        place.put(file.name, file.read_bytes())
    dataset = {"name": "webdataset", "data_dir": str(place), "image_size": tiny_run.SIDE, "remote_shards": "read"}
    build_cache(tiny_build.recipe(root, dataset=dataset, num_views=VIEWS, out=tmp_path / "cache.zarr"))
    assert tiny_build.arrays_of(tmp_path / "cache.zarr") == tiny_build.arrays_of(root / "cache.zarr")
    cache = TeacherCache.open(tmp_path / "cache.zarr")
    assert cache.manifest.provenance["folders"]["train"]["folder"] == str(place)
    assert check_images(cache)[0].problem is None
    train(root, tmp_path / "run", f"data_dir={place}", "dataset.remote_shards=read")
    assert outcome(tmp_path / "run") == outcome(root / "run")
    assert not (tmp_path / "home/shards").exists()


def test_train_on_the_labels_of_a_list(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = {**write_list(root / "pictures", tmp_path / "list.csv"), "image_size": tiny_run.SIDE}
    settings = [f"dataset.{key}={value}" for key, value in dataset.items()]
    options = [part for each in [*settings, "views.ops=[flip]", "loggers=[]"] for part in ("--set", each)]
    line = ("--loss", "ce", "--student", "resnet8", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "run"))
    assert run(Command("train-student", ("digits", *line, *options))) == {"code": 0}
    assert "next: evaluate-student" in capsys.readouterr().out
    evaluated = ("evaluate-student", str(tmp_path / "run"), "--device", "cpu", "--data-dir", str(root / "pictures"))
    assert run(Command(evaluated[0], evaluated[1:])) == {"code": 0}  # the folder of the same images


def outcome(folder: Path) -> tuple[dict[str, bytes], list[Any]]:
    """The weights of a student and its metrics."""
    weights = {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / LAST).items()}
    return weights, pl.read_parquet(folder / "metrics.parquet").drop(tiny_run.TIMINGS).rows()
