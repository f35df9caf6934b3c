"""Label tables: both forms, splits, order, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache_tools.errors import DataError
from cache_tools.images.label_table import LabelTable, read_label_table


def read(tmp_path: Path, text: str, split: str | None = None) -> LabelTable:
    file = tmp_path / "labels.csv"
    file.write_text(text, encoding="utf-8")
    return read_label_table(file, split)


@pytest.mark.parametrize(
    "text",
    [
        "path,dog,cat\nb.png,1,0\na/z.png,0,0\na.png,1,1\n",
        "cat,path,dog\n0,b.png,1\n,./a/z.png,0.0\n1.0,a.png,1\n",
    ],
)
def test_a_column_per_class_keeps_the_order_of_the_columns(tmp_path: Path, text: str) -> None:
    table = read(tmp_path, text)
    expected = {"a/z.png": set(), "a.png": {"cat", "dog"}, "b.png": {"dog"}}
    assert table.paths == ("a/z.png", "a.png", "b.png")
    assert table.class_names == (("dog", "cat") if text.startswith("path") else ("cat", "dog"))
    assert labels_by_path(table) == expected
    assert table.labels.dtype == np.uint8


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("path,labels\nb.png,dog\na.png,dog cat\nc.png,\n", ("cat", "dog")),
        ("file_name,labels\nb.png,dog\na.png,dog; cat ;\nc.png,\n", ("cat", "dog")),
        (
            'filename,labels\nb.png,polar bear;dog\na.png,"dog;Äpfel, rot"\nc.png,\n',
            ("dog", "polar bear", "Äpfel, rot"),
        ),
    ],
)
def test_names_in_a_column_are_sorted(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    table = read(tmp_path, text)
    assert table.class_names == names
    assert labels_by_path(table)["c.png"] == set()
    assert "dog" in labels_by_path(table)["a.png"]


def test_all_splits_have_the_classes_of_the_file(tmp_path: Path) -> None:
    text = "path,split,labels\nb.png,train,dog\na.png,test,cat\nc.png,train,dog emu\n"
    train, test = read(tmp_path, text, "train"), read(tmp_path, text, "test")
    assert train.class_names == test.class_names == ("cat", "dog", "emu")
    assert labels_by_path(train) == {"b.png": {"dog"}, "c.png": {"dog", "emu"}}
    assert labels_by_path(test) == {"a.png": {"cat"}}
    with pytest.raises(DataError, match=r"no image of that split.*expected split val; found test, train"):
        read(tmp_path, text, "val")


def test_class_names_that_look_like_numbers_stay_text(tmp_path: Path) -> None:
    assert read(tmp_path, "path,labels\na.png,007;1e3\n").class_names == ("007", "1e3")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,cat\na.png,1\n", "not a table of labels.*found the columns image, cat"),
        ("path,cat\na.png,-1\n", "found '-1' in column cat, row 1"),
        ("path,cat\na.png,yes\n", "found 'yes' in column cat"),
        ("path\na.png\n", "found no class"),
        ("path,labels\na.png,\n", "found no class"),
        ("path,cat\na.png,1\n./a.png,0\n", "listed twice.*found a.png"),
        ("path,cat\n,1\n", "a row without a path"),
        ("path,cat\n", "found no row"),
        ("", "not a table of labels"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file of labels \(.*nosuch.csv\)"):
        read_label_table(tmp_path / "nosuch.csv", None)


def labels_by_path(table: LabelTable) -> dict[str, set[str]]:
    return {
        path: {name for name, has in zip(table.class_names, row, strict=True) if has}
        for path, row in zip(table.paths, table.labels.tolist(), strict=True)
    }
