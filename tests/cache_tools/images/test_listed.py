"""Lists of image files, csv and Parquet: the same samples as the folder's, and one clear error for a bad list."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from cache_tools.errors import CacheError, DataError
from cache_tools.images import index, open_images
from cache_tools.images.folder import FolderImages
from cache_tools.images.kinds import source_at
from cache_tools.images.recipe import DatasetRecipe
from tests.support import tiny_run

Rows = list[tuple[str, str, str]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return tiny_run.write_pictures(tmp_path / "pictures", train=9, test=4)


def rows_of(pictures: Path) -> Rows:
    """(path, class, split) of every picture, in the order of a folder."""
    files = sorted(pictures.glob("*/*/*.png"))
    return [(str(file.relative_to(pictures)), file.parts[-2], file.parts[-3]) for file in files]


def write_list(path: Path, rows: Sequence[Sequence[Any]], columns: Sequence[str] = ("path", "label", "split")) -> Path:
    table = pl.DataFrame(rows, schema=list(columns), orient="row")
    if path.suffix == ".csv":
        table.write_csv(path)
    else:
        table.write_parquet(path)
    return path


def recipe_of(place: Path, **settings: Any) -> DatasetRecipe:
    name = source_at(place, "csv")
    return DatasetRecipe(name=name, data_dir=place, image_size=tiny_run.SIDE, **settings)


def opened(place: Path, split: str | None = None, **settings: Any) -> FolderImages:
    images = open_images(recipe_of(place, **settings), split)
    assert isinstance(images, FolderImages)
    return images


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("layout", ["one list", "list per split"])
def test_a_list_of_a_folder_is_the_folder(pictures: Path, ending: str, layout: str) -> None:
    rows = rows_of(pictures)
    if layout == "one list":
        place = write_list(pictures / f"all.{ending}", rows)
    else:
        place = pictures
        for split in ("train", "test"):
            some = [row[:2] for row in rows if row[2] == split]
            write_list(place / f"{split}.{ending}", some, ("path", "label"))
    for split in ("train", "test"):
        wanted = open_images(tiny_run.dataset(pictures), split)
        found = open_images(DatasetRecipe(name=ending, data_dir=place, image_size=tiny_run.SIDE), split)
        assert found.class_names == wanted.class_names == tiny_run.CLASSES
        assert np.array_equal(found.labels, wanted.labels)
        assert np.array_equal(found.keys, wanted.keys)
        assert np.array_equal(found.load(slice(None)), wanted.load(slice(None)))
    assert np.array_equal(
        open_images(recipe_of(place).model_copy(update={"name": ending}), "train[1::2]").keys,
        open_images(tiny_run.dataset(pictures), "train[1::2]").keys,
    )


def test_samples_are_the_rows_in_order(pictures: Path) -> None:
    rows = [row for row in rows_of(pictures) if row[2] == "train"][::-1]
    found = opened(write_list(pictures / "list.csv", rows), test_split=None)
    assert [found.name_of(row) for row in range(9)] == [row[0] for row in rows]
    assert [found.class_names[label] for label in found.labels] == [row[1] for row in rows]


def test_labels_may_be_numbers(pictures: Path) -> None:
    rows = [(path, tiny_run.CLASSES.index(name), split) for path, name, split in rows_of(pictures)]
    for ending in ("csv", "parquet"):
        place = write_list(pictures / f"numbers.{ending}", rows)
        assert opened(place).class_names == ("0", "1", "2")
        named = opened(place, class_order=tiny_run.CLASSES)
        assert named.content_digest == open_images(tiny_run.dataset(pictures)).content_digest


def test_columns_may_have_other_names(pictures: Path) -> None:
    rows = [(name, "x", path) for path, name, split in rows_of(pictures) if split == "train"]
    place = write_list(pictures / "list.csv", rows, ("kind", "label", "where"))
    settings: Any = {"test_split": None, "image_column": "where"}
    assert opened(place, label_column="kind", **settings).class_names == tiny_run.CLASSES
    assert opened(place, **settings).class_names == ("x",)


def test_only_new_files_are_read_again(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    examine: Callable[[Path], Any] = index._examine_file
    monkeypatch.setattr(index, "_examine_file", lambda path: read.append(path.name) or examine(path))  # type: ignore[func-returns-value]
    monkeypatch.setattr(index, "YOUNG_NS", 0)
    monkeypatch.setattr(index, "INDEXED_FROM_FILES", 1)
    place = write_list(pictures / "list.csv", [row for row in rows_of(pictures) if row[2] == "train"])
    opened(place)
    read.clear()
    os.utime(pictures / "train/red/002.png")
    write_list(pictures / "other.csv", rows_of(pictures)[:2])  # has an index of its own
    opened(pictures / "other.csv", split="test", test_split=None)
    read.clear()
    opened(place)
    assert read == ["002.png"]


def test_absolute_paths_and_paths_of_other_folders(pictures: Path, tmp_path: Path) -> None:
    rows = [(str(pictures / "train/red/002.png"), "red"), ("../pictures/train/blue/000.png", "blue")]
    (tmp_path / "lists").mkdir()
    found = opened(write_list(tmp_path / "lists/list.csv", rows, ("path", "label")), test_split=None)
    wanted = open_images(tiny_run.dataset(pictures))
    assert {key.tobytes() for key in found.keys} <= {key.tobytes() for key in wanted.keys}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("a.png", "x")], ("file", "label"), r"no column path in the list of images .*the columns file, label"),
        ([("a.png", "x")], ("path", "kind"), r"no column label .*dataset.label_column"),
        ([("a.png", ""), (None, "x")], ("path", "label"), "1 row without a path, such as row 2"),
        ([("a.png", "x"), ("b.png", None)], ("path", "label"), "1 row without a label, such as row 2"),
        ([("train/red/002.png", "x")] * 2, ("path", "label"), r"listed twice .*train/red/002.png"),
        (
            [("train/red/002.png", "x"), ("./train/red/002.png", "y")],
            ("path", "label"),
            r"listed twice .*train/red/002.png",
        ),
        (
            [("train/red/002.png", "x"), ("gone.png", "y")],
            ("path", "label"),
            r"1 image of a list is missing .*gone.png",
        ),
        ([("note.txt", "x")], ("path", "label"), r"1 file of a list that hold no image.*note.txt: text"),
        ([("/proc/self/mem", "x")], ("path", "label"), r"where images are not looked for .*/proc/self/mem"),
        ([("../" * 40 + "sys/x.png", "x")], ("path", "label"), "where images are not looked for"),
        ([("train/red/002.png", "x", "dev")], ("path", "label", "split"), r"no image of that split .*found dev"),
    ],
)
def test_a_bad_list_is_one_error(pictures: Path, ending: str, rows: Any, columns: Any, message: str) -> None:
    (pictures / "note.txt").write_text("no image")
    place = write_list(pictures / f"list.{ending}", rows, columns)
    settings: Any = {} if "split" in columns else {"test_split": None}
    with pytest.raises(DataError, match=message) as caught:
        opened(place, **settings)
    assert f"list.{ending}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,label\n\xff\xfe.png,cat\n", "other bytes in line 2"),
        ("path,label\na.png,cat\n".encode("utf-16"), "UTF-16 text"),
        (b"", "not a list of images"),
        (b"path,label\n", "no row"),
        (b"path,label,path\na.png,cat,b.png\n", "a column twice: path"),
        (b"path,label\na.png,cat,dog\n", "not a list of images"),
    ],
)
def test_bytes_that_are_no_csv_are_one_error(pictures: Path, content: bytes, message: str) -> None:
    (pictures / "list.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        opened(pictures / "list.csv", test_split=None)


def test_a_parquet_file_of_other_columns_is_one_error(pictures: Path) -> None:
    (pictures / "list.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot read the list of images"):
        opened(pictures / "list.parquet", test_split=None)
    pl.DataFrame({"path": [b"a.png"], "label": [1]}).write_parquet(pictures / "list.parquet")
    with pytest.raises(DataError, match="a column path of Binary"):
        opened(pictures / "list.parquet", test_split=None)


def test_splits_that_no_list_has_are_named(pictures: Path) -> None:
    place = write_list(pictures / "all.csv", rows_of(pictures))
    with pytest.raises(
        DataError, match=r"no image of that split .*expected split dev; found test, train\. Set .*test_s"
    ):
        opened(place, "dev", test_split="dev")
    with pytest.raises(DataError, match=r"no list of that split .*dev.csv.*a folder with all.csv"):
        open_images(recipe_of(pictures), "dev")
    one = write_list(pictures / "one.csv", [row[:2] for row in rows_of(pictures)], ("path", "label"))
    with pytest.raises(DataError, match=r"one split .*train and test.*dataset.test_split=null"):
        opened(one)
    with pytest.raises(DataError, match="no such list of images"):
        open_images(DatasetRecipe(name="csv", data_dir=pictures / "gone.csv"))


def test_settings_of_other_sources_are_refused(pictures: Path) -> None:
    for settings in ({"sub_folders": "merge"}, {"labels": "labels.csv"}):
        with pytest.raises(ValueError, match="is for folders only, not for csv"):
            recipe_of(pictures / "list.csv", **settings)
    with pytest.raises(
        ValueError, match=r"label_column is for Hugging Face data sets, lists of images and tar shards only"
    ):
        DatasetRecipe(name="folder", data_dir=pictures, label_column="x")
    with pytest.raises(ValueError, match=r"no such source of images: nope; known are digits, .*csv"):
        DatasetRecipe(name="nope")
    with pytest.raises(ValueError, match="csv needs data_dir"):
        DatasetRecipe(name="csv")


def test_the_source_of_a_place_is_told_by_its_files(pictures: Path, tmp_path: Path) -> None:
    place = write_list(pictures / "all.csv", rows_of(pictures))
    assert [source_at(place, "folder"), source_at(pictures, "folder"), source_at(pictures, "csv")] == [
        "csv", "folder", "csv",
    ]  # fmt: skip
    assert source_at(tmp_path / "gone", "hf") == "hf"
    assert recipe_of(place).title == "all"


def test_a_list_beside_class_folders_leaves_them_a_folder(pictures: Path) -> None:
    write_list(pictures / "list.parquet", rows_of(pictures))
    assert source_at(pictures, "folder") == "folder"
    assert source_at(pictures, "parquet") == "parquet"


def test_many_rows_are_columns(tmp_path: Path) -> None:
    """Hard links of one file: the opened split holds bytes per sample, and no objects."""
    import tracemalloc

    count = 5000
    tiny_run.write_pictures(tmp_path / "p", train=1, test=0)
    [file] = (tmp_path / "p").rglob("*.png")
    (tmp_path / "links").mkdir()
    for number in range(count):
        os.link(file, tmp_path / "links" / f"{number:06}.png")
    rows = [(f"links/{number:06}.png", "ab"[number % 2]) for number in range(count)]
    place = write_list(tmp_path / "list.csv", rows, ("path", "label"))
    opened(place, test_split=None)
    tracemalloc.start()
    try:
        images = opened(place, test_split=None)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(images) == count
    assert held < 100 * count  # 16 of the key, 8 of the label, 17 of the path, 16 of its place


def test_a_bad_list_ends_a_command_in_one_line(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.support.kill_cases import Command, run

    place = write_list(pictures / "list.csv", [("gone.png", "x", "train")])
    settings = ["dataset.name=csv", f"dataset.data_dir={place}", "dataset.test_split=null"]
    arguments = ["imagefolder", *(part for each in settings for part in ("--set", each))]
    assert run(Command("build-cache", tuple(arguments))) == {"code": 2}
    error = capsys.readouterr().err
    assert error.startswith("error: 1 image of a list is missing")
    assert error.count("\n") == 1
    with pytest.raises(CacheError):
        opened(place)


def test_the_documented_lists_of_tiny_imagenet(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    tiny_run.write_pictures(tmp_path / "p", train=6, test=3)
    annotations = []
    for number, file in enumerate(sorted((tmp_path / "p/train").rglob("*.png"))):
        (root / "train" / file.parts[-2] / "images").mkdir(parents=True, exist_ok=True)
        file.rename(root / "train" / file.parts[-2] / "images" / f"{file.parts[-2]}_{number}.JPEG")
    (root / "val/images").mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "p/test").rglob("*.png"))):
        file.rename(root / "val/images" / f"val_{number}.JPEG")
        annotations.append(f"val_{number}.JPEG\t{file.parts[-2]}\t0\t0\t62\t62\n")
    (root / "val/val_annotations.txt").write_text("".join(annotations))
    document = (Path(__file__).parents[3] / "docs/datasets.md").read_text()
    [code] = [block for block in re.findall(r"^```python\n(.*?)^```", document, re.M | re.S) if "annotations" in block]
    names: dict[str, Any] = {}
    exec(code, names)
    names["list_tiny_imagenet"](root)
    recipe = recipe_of(root, split="train", test_split="val").model_copy(update={"name": "csv"})
    train, val = open_images(recipe), open_images(recipe, "val")
    assert (train.class_names, train.labels.tolist()) == (tiny_run.CLASSES, [0, 0, 1, 1, 2, 2])
    assert (val.class_names, val.labels.tolist()) == (tiny_run.CLASSES, [0, 1, 2])
