"""Confusions equal plain counting; the plot works for few and for many classes."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tests.support.turns import some
from train.evaluate.confusion import class_figures, confusion_frame, confusion_matrix, most_confused, plot_confusion

NAMES = ("cat", "dog", "owl", "yak")
# No sample is a yak, but two were classified as one.
MATRIX = np.array([[5, 3, 0, 2], [1, 9, 0, 0], [0, 3, 3, 0], [0, 0, 0, 0]])


def test_counts_by_label_and_answer() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(500, 7)).astype(np.float32), rng.integers(0, 7, 500)
    expected = np.zeros((7, 7), int)
    for row, label in zip(logits, labels, strict=True):
        expected[label, int(np.argmax(row))] += 1
    found = confusion_matrix(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found.dtype == np.int64
    assert np.array_equal(found, expected)


def test_the_table_has_every_count_and_the_full_diagonal() -> None:
    table = confusion_frame(MATRIX, NAMES)
    assert table.columns == ["label", "label_name", "predicted", "predicted_name", "count", "share"]
    rows = {(row["label_name"], row["predicted_name"]): row for row in table.to_dicts()}
    assert len(rows) == 4 + 4
    assert rows["cat", "yak"]["count"] == 2
    assert rows["cat", "yak"]["share"] == pytest.approx(0.2)
    assert rows["yak", "yak"] | {"count": 0, "share": None} == rows["yak", "yak"]
    assert table["count"].sum() == MATRIX.sum()
    assert table["share"].dtype == pl.Float64


def test_classes_have_accuracy_and_precision() -> None:
    cat, dog, owl, yak = class_figures(MATRIX, NAMES)
    assert (cat.n, cat.accuracy, cat.precision) == (10, 0.5, pytest.approx(5 / 6))
    assert (dog.accuracy, dog.precision) == (0.9, pytest.approx(9 / 15))
    assert (owl.label, owl.name, owl.precision) == (2, "owl", 1.0)
    assert (yak.n, yak.accuracy, yak.precision) == (0, None, 0.0)


def test_confusions_are_sorted_by_count_then_share() -> None:
    confusions = most_confused(MATRIX, NAMES)
    assert [(confusion.label, confusion.predicted, confusion.count) for confusion in confusions] == [
        ("owl", "dog", 3),  # half of the owls
        ("cat", "dog", 3),
        ("cat", "yak", 2),
        ("dog", "cat", 1),
    ]
    assert confusions[0].share == pytest.approx(0.5)
    assert most_confused(MATRIX, NAMES, 1) == confusions[:1]
    assert most_confused(np.diag([3, 4]), ("a", "b")) == ()


@pytest.mark.parametrize("classes", some([10, 2, 100], 1))
def test_the_plot_is_a_png_that_is_not_empty(classes: int) -> None:
    rng = np.random.default_rng(classes)
    matrix = rng.poisson(0.3, (classes, classes)) + 20 * np.eye(classes, dtype=np.int64)
    names = [f"a rather long name of class {label}" for label in range(classes)]
    data = plot_confusion(matrix, names, "title")
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert 900 < width < 2500
    assert 600 < height < 2000
    clean = plot_confusion(np.diag(np.full(classes, 20)), names, "title")
    assert clean != data


def test_the_plot_has_the_share_of_each_class_in_per_cent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 8, 1000 and 3 images, each recomputed by hand; shares from 9.95 % on are without decimals."""
    drawn: list[Any] = []

    def keep(figure: Any) -> bytes:
        drawn.append(figure)
        return b""

    monkeypatch.setattr("train.evaluate.confusion.png", keep)
    plot_confusion(np.array([[6, 2, 0], [1, 990, 9], [1, 1, 1]]), ("a", "b", "c"), "title")
    left, right, *_ = drawn[0].axes
    cells = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in left.texts}
    assert cells == {
        (0, 0): "75", (0, 1): "25", (1, 0): "0.1", (1, 1): "99", (1, 2): "0.9",
        (2, 0): "33", (2, 1): "33", (2, 2): "33",
    }  # fmt: skip
    texts = [text.get_text() for text in right.texts]
    assert texts[:4] == ["b → c", "9 (0.9 %)", "a → b", "2 (25.0 %)"], "the most frequent first"


def test_dollar_signs_in_names_are_no_formulas() -> None:
    names = (r"$\foo{$", "a $5 bill and a $10 bill", "$", "yak")
    assert plot_confusion(MATRIX, names, r"$\foo{$").startswith(b"\x89PNG")
