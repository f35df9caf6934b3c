"""Hugging Face data sets: every layout gives the samples of the same pictures in a folder; damage is one error."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cache_tools.errors import DataError
from cache_tools.images import check, hf, open_images
from cache_tools.images.encoded import EncodedImages
from cache_tools.images.own_folder import read_own_folder
from cache_tools.images.recipe import DatasetRecipe
from tests.support import hf_files, tiny_run
from tests.support.turns import turns

Layout = Callable[[dict[str, pa.Table], Path], Path]


def card_only(tables: dict[str, pa.Table], root: Path) -> Path:
    """Parquet files without features in their schema and with names that say nothing; the card has both."""
    names = json.loads(tables["train"].schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    plain = {f"part{number}": table.replace_schema_metadata(None) for number, table in enumerate(tables.values())}
    hf_files.hub_files(plain, root, folder="files")
    paths = "".join(f"  - split: {split}\n    path: files/part{number}-*\n" for number, split in enumerate(tables))
    numbered = "".join(f"          '{number}': {name}\n" for number, name in enumerate(names))
    label = f"  - name: label\n    dtype:\n      class_label:\n        names:\n{numbered}"
    features = f"dataset_info:\n  features:\n  - name: image\n    dtype: image\n{label}"
    (root / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{paths}{features}---\n# Pictures\n"
    )
    return root


LAYOUTS: dict[str, Layout] = {
    "save_to_disk": hf_files.save_to_disk,
    "hub files": hf_files.hub_files,
    "hub cache": hf_files.hub_cache,
    "prepared": hf_files.prepared,
    "card": card_only,
    "one file a split": lambda tables, root: hf_files.hub_files(tables, root, shards=1),
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    check._memory.cache_clear()
    return tmp_path / "home"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_pictures(tmp_path_factory.mktemp("images") / "pictures", train=11, test=5)


@pytest.fixture(scope="module")
def tables(pictures: Path) -> dict[str, pa.Table]:
    return hf_files.folder_tables(pictures)


def recipe_of(root: Path, **fields: Any) -> DatasetRecipe:
    return DatasetRecipe.model_validate({"name": "hf", "data_dir": root, "image_size": 8, **fields})


def open_table(table: pa.Table, root: Path, **fields: Any) -> EncodedImages:
    hf_files.save_one(table, root, "train")
    images = open_images(recipe_of(root, test_split=None, **fields))
    assert isinstance(images, EncodedImages)
    return images


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_the_folder_of_the_same_images(
    layout: str, pictures: Path, tables: dict[str, pa.Table], tmp_path: Path
) -> None:
    root = LAYOUTS[layout](tables, tmp_path / "set")
    found = DatasetRecipe.model_validate(read_own_folder(root).dataset)
    assert (found.name, found.split, found.test_split) == ("hf", "train", "test")
    folder = DatasetRecipe(name="folder", data_dir=pictures, image_size=8)
    for split in ("train", "test"):
        wanted, images = open_images(folder, split), open_images(recipe_of(root), split)
        assert images.class_names == wanted.class_names == ("blue", "green", "red")
        assert images.labels.tolist() == wanted.labels.tolist()
        assert images.keys.tolist() == wanted.keys.tolist()
        assert images.content_digest == wanted.content_digest
        assert (images.load(slice(None)) == wanted.load(slice(None))).all()
        part = np.array([4, 0, 3])
        assert (images.load(part) == wanted.load(part)).all()
        assert (images.subset(part).load(slice(1, 3)) == wanted.load(part[1:])).all()


def test_a_part_and_a_pickled_split_have_the_same_images(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    root = hf_files.hub_files(tables, tmp_path / "set")
    whole = open_images(recipe_of(root))
    part = open_images(recipe_of(root), "train[1::3]")
    assert part.keys.tolist() == whole.keys[1::3].tolist()
    copy = pickle.loads(pickle.dumps(part))
    assert (copy.load(slice(None)) == whole.load(np.arange(1, 11, 3))).all()
    assert len(pickle.dumps(part)) < 3000  # names of files, no images


def test_parquet_is_unpacked_once_and_again_after_a_change(
    tables: dict[str, pa.Table], tmp_path: Path, home: Path
) -> None:
    root = hf_files.hub_files({"train": tables["train"]}, tmp_path / "set", shards=1)
    images = open_images(recipe_of(root, test_split=None))
    (copy,) = (home / hf.UNPACKED).iterdir()
    before = copy.stat().st_ino
    os.utime(copy, (0, 0))
    open_images(recipe_of(root, test_split=None))
    assert copy.stat().st_ino == before
    assert copy.stat().st_mtime > 0, "the time of its last use, for `cache-tools prune`"
    shutil.rmtree(root)
    other = tables["train"].take(pa.array(range(10, -1, -1)))
    hf_files.hub_files({"train": other}, root, shards=1)
    again = open_images(recipe_of(root, test_split=None))
    assert again.keys.tolist() == images.keys[::-1].tolist()


@pytest.mark.parametrize(
    ("labels", "names", "classes", "numbers"),
    [
        (["dog", "cat", "dog", "10", "2"], None, ("10", "2", "cat", "dog"), [3, 2, 3, 0, 1]),
        ([7, 10, 2, 7, 2], None, ("2", "7", "10"), [1, 2, 0, 1, 0]),
        ([1, 0, 2, 1, 0], ["z", "y", "x"], ("z", "y", "x"), [1, 0, 2, 1, 0]),
        ([True, False, True, True, False], None, ("False", "True"), [1, 0, 1, 1, 0]),
    ],
)
def test_labels_are_numbers_or_names(
    pictures: Path, tmp_path: Path, labels: list[Any], names: list[str] | None, classes: tuple[str, ...],
    numbers: list[int],
) -> None:  # fmt: skip
    data = [file.read_bytes() for file in sorted(pictures.rglob("*.png"))[:5]]
    images = open_table(hf_files.image_table(data, labels, names), tmp_path / "set")
    assert (images.class_names, images.labels.tolist()) == (classes, numbers)


def test_classes_may_be_put_into_another_order(pictures: Path, tmp_path: Path) -> None:
    data = [file.read_bytes() for file in sorted(pictures.rglob("*.png"))[:4]]
    table = hf_files.image_table(data, [0, 1, 2, 0], ["c10", "c2", "a"])
    images = open_table(table, tmp_path / "set", class_order="natural")
    assert (images.class_names, images.labels.tolist()) == (("a", "c2", "c10"), [2, 1, 0, 2])


def test_a_list_of_labels_is_for_images_with_several(pictures: Path, tmp_path: Path) -> None:
    data = [file.read_bytes() for file in sorted(pictures.rglob("*.png"))[:3]]
    table = hf_files.image_table(data, [[0, 2], [], [1]], None)
    feature = {"_type": "Sequence", "feature": hf_files.class_label("a", "b", "c")}
    table = hf_files.with_features(table, {"image": {"_type": "Image"}, "label": feature})
    images = open_table(table, tmp_path / "set")
    assert images.multi_label
    assert images.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_columns_are_chosen_where_several_may_be_meant(pictures: Path, tmp_path: Path) -> None:
    data = [file.read_bytes() for file in sorted(pictures.rglob("*.png"))[:4]]
    mask = pa.array([{"bytes": each, "path": None} for each in reversed(data)], hf_files.IMAGE_TYPE)
    table = pa.table({
        "img": pa.array([{"bytes": each, "path": None} for each in data], hf_files.IMAGE_TYPE),
        "fine": pa.array([0, 1, 2, 3]), "coarse": pa.array([1, 1, 0, 0]), "id": pa.array([9, 8, 7, 6]),
    })  # fmt: skip
    labels = {"fine": hf_files.class_label(*"abcd"), "coarse": hf_files.class_label("x", "y")}
    table = hf_files.with_features(table, {"img": {"_type": "Image"}, **labels})
    with pytest.raises(DataError, match=r"several columns may be the labels.*label_column=coarse"):
        open_table(table, tmp_path / "labels")
    images = open_images(recipe_of(tmp_path / "labels", test_split=None, label_column="coarse"))
    assert (images.class_names, images.labels.tolist()) == (("x", "y"), [1, 1, 0, 0])
    with pytest.raises(DataError, match=r"no such column of labels .*label_column=img"):
        open_images(recipe_of(tmp_path / "labels", test_split=None, label_column="img"))
    two = hf_files.with_features(table.append_column("mask", mask), labels)
    with pytest.raises(DataError, match=r"several columns of images.*Choose one of img, mask"):
        open_table(two, tmp_path / "images", label_column="fine")
    masks = open_images(recipe_of(tmp_path / "images", test_split=None, label_column="fine", image_column="mask"))
    assert masks.keys.tolist() == images.keys[::-1].tolist()


def test_a_column_of_plain_bytes_is_read(pictures: Path, tmp_path: Path) -> None:
    data = [file.read_bytes() for file in sorted(pictures.rglob("*.png"))[:3]]
    table = pa.table({"picture": pa.array(data, pa.large_binary()), "label": pa.array(["b", "a", "b"])})
    images = open_table(table, tmp_path / "set")
    assert (images.class_names, images.labels.tolist()) == (("a", "b"), [1, 0, 1])
    assert images.load(slice(None)).shape == (3, 3, 8, 8)


def test_images_that_are_stored_as_paths_are_read_from_there(
    pictures: Path, tables: dict[str, pa.Table], tmp_path: Path
) -> None:
    files = sorted((pictures / "train").rglob("*.png"))
    values = [{"bytes": None, "path": str(file)} for file in files]
    values[3] = {"bytes": None, "path": str(tmp_path / "gone.png")}
    labels = tables["train"]["label"].to_pylist()
    table = pa.table({"image": pa.array(values, hf_files.IMAGE_TYPE), "label": pa.array(labels)})
    images = open_table(table, tmp_path / "set")
    whole = open_images(DatasetRecipe(name="folder", data_dir=pictures, image_size=8))
    others = np.delete(np.arange(11), 3)
    assert (images.load(others) == whole.load(others)).all()
    with pytest.raises(DataError, match=r"1 damaged image .*row 3 \(.*gone.png\)"):
        check.check_images(images)


def test_damaged_images_are_listed_by_row_and_can_be_left_out(pictures: Path, tmp_path: Path) -> None:
    data: list[bytes | None] = [file.read_bytes() for file in sorted(pictures.rglob("*.png"))[:6]]
    data[1], data[4] = data[1][:-30], None  # type: ignore[index]
    table = hf_files.image_table(data, [0, 1, 0, 1, 0, 1], ["a", "b"])
    images = open_table(table, tmp_path / "set")
    with pytest.raises(DataError, match="2 damaged images") as caught:
        check.check_images(images)
    assert "train, row 1 (1.png)" in str(caught.value)
    assert "no image and no file of that name: " in str(caught.value)
    sound = open_images(recipe_of(tmp_path / "set", test_split=None, on_bad_image="skip"))
    assert sound.keys.tolist() == images.keys[[0, 2, 3, 5]].tolist()
    assert sound.labels.tolist() == [0, 0, 1, 1]
    assert "2 damaged images skipped" in sound.notes()[0]


@pytest.mark.parametrize("labels", [[-1, -1, -1], [0, None, 1], [0, 1, -1]])
def test_rows_without_a_label_are_refused(pictures: Path, tmp_path: Path, labels: list[int | None]) -> None:
    data = [file.read_bytes() for file in sorted(pictures.rglob("*.png"))[:3]]
    with pytest.raises(DataError, match=r"of 3 rows have no label .*test_split=validation"):
        open_table(hf_files.image_table(data, labels, ["a", "b"]), tmp_path / "set")


def test_labels_beyond_the_classes_are_refused(pictures: Path, tmp_path: Path) -> None:
    data = [file.read_bytes() for file in sorted(pictures.rglob("*.png"))[:3]]
    with pytest.raises(DataError, match=r"no number of a class .*expected 0 to 1; found label: 5"):
        open_table(hf_files.image_table(data, [0, 5, 1], ["a", "b"]), tmp_path / "set")
    with pytest.raises(DataError, match=r"class names that are there twice .*found a"):
        open_table(hf_files.image_table(data, [0, 1, 1], ["a", "a"]), tmp_path / "twice")


def test_a_table_without_images_is_refused(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "label": [0, 1]})
    with pytest.raises(DataError, match=r"no column of encoded images.*text \(string\), label \(int64\)"):
        open_table(table, tmp_path / "set")


def test_an_unknown_split_is_named_with_those_there_are(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    root = hf_files.save_to_disk(tables, tmp_path / "set")
    with pytest.raises(DataError, match=r"no such split .*one of test, train; found dev.*dataset.test_split"):
        open_images(recipe_of(root, test_split="dev"), "dev")


@pytest.mark.parametrize("layout", ["save_to_disk", "hub files"])
def test_missing_files_are_named(layout: str, tables: dict[str, pa.Table], tmp_path: Path) -> None:
    root = LAYOUTS[layout](tables, tmp_path / "set")
    next(file for file in sorted(root.rglob("*00001-of-00002.*")) if "train" in str(file)).unlink()
    with pytest.raises(DataError, match=r"files of a data set are missing .*found no (number 00001|data-00001)"):
        open_images(recipe_of(root))


@pytest.mark.parametrize("layout", ["save_to_disk", "hub files", "prepared"])
def test_damaged_files_are_one_error(layout: str, tables: dict[str, pa.Table], tmp_path: Path) -> None:
    root = LAYOUTS[layout](tables, tmp_path / "set")
    file = next(file for file in sorted(root.rglob("*")) if file.suffix in {".arrow", ".parquet"})
    data = file.read_bytes()
    for length in (0, 5, 100, len(data) // 2, len(data) - 9, len(data) - 8):
        file.write_bytes(data[:length])
        with pytest.raises(DataError, match=r"cannot read a file of the data set .*(save|set) ") as caught:
            [open_images(recipe_of(root), split) for split in ("train", "test")]
        assert file.name in str(caught.value)


@pytest.mark.turns
def test_flipped_bytes_are_an_error_or_other_images(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    """Offsets that point outside of a mapped file would end the process."""
    root = hf_files.save_one(tables["test"], tmp_path / "set", "train", shards=1)
    file = root / "data-00000-of-00001.arrow"
    data, rng = file.read_bytes(), np.random.default_rng(0)
    for _ in range(turns(60, 3000)):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            damaged[place] ^= int(rng.integers(1, 256))
        file.write_bytes(bytes(damaged))
        try:
            images = open_images(recipe_of(root, test_split=None))
            images.load(slice(None))
        except DataError:
            continue
        assert len(images)
