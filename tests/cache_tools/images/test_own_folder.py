"""A folder of images as an argument: which splits are found, and what other folders are refused with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cache_tools.errors import CacheError, DataError, RecipeError
from cache_tools.images import open_images
from cache_tools.images.own_folder import is_folder_argument, read_own_folder
from cache_tools.images.recipe import DatasetRecipe
from tests.support import tiny_run


@pytest.mark.parametrize(
    ("folders", "split", "test_split", "note"),
    [
        (["train", "test", "val"], "train", "test", "training images in train, test images in test"),
        (["train", "val"], "train", "val", "test images in val"),
        (["training", "validation"], "training", "validation", "training images in training"),
        (["train", "valid", "extra"], "train", "valid", "test images in valid"),
        (["train"], "train", None, "no test images .* nothing is evaluated"),
        (["cat", "dog"], "train", None, "training images in its class folders, no test images"),
    ],
)
def test_splits_are_found_by_their_names(
    tmp_path: Path, folders: list[str], split: str, test_split: str | None, note: str
) -> None:
    for name in folders:
        (tmp_path / "My photos" / name).mkdir(parents=True)
    found = read_own_folder(tmp_path / "My photos")
    assert (found.name, found.dataset["split"], found.dataset["test_split"]) == ("My-photos", split, test_split)
    assert re.search(note, found.note)


def test_the_found_splits_open(tmp_path: Path) -> None:
    tiny_run.write_pictures(tmp_path / "pictures", train=6, test=3)
    dataset = DatasetRecipe.model_validate(read_own_folder(tmp_path / "pictures").dataset)
    assert (len(open_images(dataset)), len(open_images(dataset, dataset.test_splits[0]))) == (6, 3)
    plain = DatasetRecipe.model_validate(read_own_folder(tmp_path / "pictures" / "train").dataset)
    assert len(open_images(plain)) == 6
    assert plain.image_size == 256


def test_the_name_of_a_recipe_is_not_the_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    names = ["digits", "cifar100"]
    assert [is_folder_argument(text, names) for text in ("digits", "./digits", "digits/", "cifar100")] == [
        False, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        ("zarr.json", RecipeError, r"is a cache .*--cache"),
        ("run.json", RecipeError, r"is a run of train-student .*recipe.yaml.*--teacher"),
        ("sweep.yaml", RecipeError, r"is a sweep of sweep-students .*report-students.*trials"),
        ("evaluation.json", RecipeError, r"is an evaluation of a student and no folder of images"),
        ("dataset_info.json", DataError, r"no files of a Hugging Face data set .*save_to_disk\(FOLDER\)"),
        ("data/part-00000-of-00002.parquet", DataError, r"files of a data set are missing .*found no number 00001"),
        ("dataset_dict.json", DataError, r"a damaged file of a data set .*no list of splits"),
        ("test/cat/1.png", DataError, "test images and no training images"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, file: str, error: type[CacheError], message: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(error, match=message):
        read_own_folder(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        ["x/run.json", "x/metrics.parquet"],
        ["runs/x/run.json", "runs/x/metrics.parquet", "runs/all.parquet"],
        ["s/sweep.yaml", "s/trials.parquet"],
        ["e/evaluation.json", "e/confusion.parquet"],
    ],
)
def test_tables_of_our_own_folders_are_no_data_set(tmp_path: Path, files: list[str]) -> None:
    for name in ["cat/1.png", "dog/1.png", *files]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert "its class folders" in read_own_folder(tmp_path).note
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.parquet").touch()
    assert read_own_folder(tmp_path).dataset["name"] == "hf"


@pytest.mark.parametrize(
    ("files", "split", "test_split"),
    [
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001-0123abcd.parquet"], "train", "test"),
        (["default/train/0000.parquet", "default/validation/0000.parquet"], "train", "validation"),
        (["train.parquet", "val.parquet", "dev.parquet"], "train", "validation"),
        (["pictures_test.parquet", "pictures_train.parquet"], "train", "test"),
        (["all.parquet"], "train", None),
        (["unlabelled-00000-of-00001.parquet"], "unlabelled", None),
    ],
)
def test_splits_of_a_hugging_face_data_set(
    tmp_path: Path, files: list[str], split: str, test_split: str | None
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = read_own_folder(tmp_path)
    assert found.dataset == {
        "name": "hf", "data_dir": str(tmp_path), "split": split, "test_split": test_split, "image_size": 256,
    }  # fmt: skip
    assert f"a Hugging Face data set, training images in {split}, " in found.note


def test_a_data_set_of_several_configurations_asks_for_one(tmp_path: Path) -> None:
    for name in ("large/train-00000-of-00001.parquet", "small/train-00000-of-00001.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"several files of the split train .*found large, small. Give the folder"):
        read_own_folder(tmp_path)
    card = "".join(f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("large", "small"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    with pytest.raises(DataError, match=r"several configurations of the data set .*found large, small"):
        read_own_folder(tmp_path)
    assert read_own_folder(tmp_path / "small").dataset["split"] == "train"


def test_two_splits_without_train_ask_for_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}-00000-of-00001.parquet").touch()
    with pytest.raises(DataError, match=r"no split `train` .*found the splits a, b. .*dataset.split=a"):
        read_own_folder(tmp_path)
    assert read_own_folder(tmp_path, [("dataset.split", "b")]).name == tmp_path.name


@pytest.mark.parametrize(("image_size", "view_size"), [(None, 224), (256, 224), (64, 56), (48, 42), ("large", 224)])
def test_the_views_follow_the_size_of_the_images(tmp_path: Path, image_size: object, view_size: int) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    settings = [] if image_size is None else [("dataset.image_size", image_size)]
    assert read_own_folder(tmp_path, settings).views["ops"][0]["size"] == view_size
