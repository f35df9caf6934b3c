"""The plot of a run shows its history and its references, and its labels never overlap."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.support.turns import some
from train.runs.curves import _accuracy_range, _draw, _spread, plot_curves

EPOCHS = 12
REFERENCES = {"teacher": 0.981, "CLIP": 0.94, "fusion": 0.986, "labels only": 0.972}


def make_history(**columns: list[float | None]) -> pl.DataFrame:
    epoch = np.arange(EPOCHS)
    decay = np.exp(-epoch / 3)
    data = {
        "epoch": epoch, "view": epoch % 4, "learning_rate": 0.1 * decay,
        "loss": 9 * decay + 1, "loss_ce": 2 * decay + 0.2, "loss_logit": 7 * decay + 0.8,
        "test_top1": 0.985 - 0.88 * decay, "test_nll": 2 * decay, "images_per_s": 1e3 + decay, "epoch_s": decay,
    }  # fmt: skip
    return pl.DataFrame({**data, **columns})


def test_the_png_has_a_readable_size_and_two_panels(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plot_curves(make_history(), path, "digits: resnet8x4", REFERENCES)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1400, 560)
        pixels = np.asarray(image.convert("RGB")).reshape(560, 2, 700, 3)
    for half in (0, 1):
        colours = {tuple(colour) for colour in pixels[:, half].reshape(-1, 3)}
        assert (0x00, 0x72, 0xB2) in colours, "cross entropy left, the student right"
        assert (0xD5, 0x5E, 0x00) in colours, "the logit term left, the teacher right"


def test_lines_show_the_history() -> None:
    history = make_history()
    left, right = _draw(history, "title", REFERENCES).axes
    assert [line.get_label() for line in left.lines] == ["total", "cross entropy", "logit term"]
    for line, column in zip(left.lines, ("loss", "loss_ce", "loss_logit"), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), history[column])
    *dashed, student = right.lines
    np.testing.assert_allclose(student.get_ydata(), 100 * history["test_top1"].to_numpy())
    assert [line.get_ydata()[0] for line in dashed] == pytest.approx([100 * value for value in REFERENCES.values()])
    texts = {text.get_text() for text in right.texts}
    assert texts == {"teacher 98.1", "CLIP 94.0", "fusion 98.6", "labels only 97.2", "student 96.3"}
    styles = {line.get_linestyle() for line in left.lines}
    assert len(styles) == len(left.lines), "the lines differ in style, not only in colour"


def test_missing_columns_and_values_are_left_out() -> None:
    sparse = [0.5 if epoch % 5 == 4 else None for epoch in range(EPOCHS)]
    history = make_history(test_top1=sparse, loss=[math.nan, *[1.0] * (EPOCHS - 1)]).drop("loss_logit", "loss_ce")
    left, right = _draw(history, "title", {}).axes
    assert [list(line.get_xdata()) for line in left.lines] == [list(range(2, EPOCHS + 1))]  # counted from 1
    assert list(right.lines[0].get_xdata()) == [5, 10]


def test_a_single_term_is_drawn_once() -> None:
    left, _ = _draw(make_history().drop("loss_logit"), "title", {}).axes
    assert [line.get_label() for line in left.lines] == ["loss"]
    assert left.get_legend() is None


@pytest.mark.parametrize("rows", some([0, 1, 2], 1))
def test_short_runs(rows: int, tmp_path: Path) -> None:
    plot_curves(make_history().head(rows), tmp_path / "few.png", "few", None)
    plot_curves(make_history().head(rows).drop("test_top1"), tmp_path / "none.png", "none", {"teacher": 0.9})
    assert (tmp_path / "few.png").stat().st_size > 1000
    plot_curves(make_history().head(rows), tmp_path / "name.png", r"a $\foo{$ is no formula")
    figure = _draw(make_history().drop("test_top1"), "title", {})
    assert "not evaluated" in [text.get_text() for text in figure.axes[1].texts]


@given(
    curve=st.lists(st.floats(0, 100), min_size=1, max_size=50),
    references=st.lists(st.floats(0, 100), max_size=5),
)
def test_the_end_of_the_curve_and_references_are_in_range(curve: list[float], references: list[float]) -> None:
    low, high = _accuracy_range(curve, references)
    assert all(low < value < high for value in [*curve[len(curve) // 4 :], *references])


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8).map(sorted))
def test_labels_do_not_overlap_and_stay_inside(heights: list[float]) -> None:
    gap = 6.2
    placed = _spread(heights, gap, 0.0, 100.0)
    assert len(placed) == len(heights)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(placed))
    assert placed[0] >= -1e-9
    assert placed[-1] <= 100 + 1e-9


def test_labels_that_do_not_touch_are_not_moved() -> None:
    assert _spread([10.0, 50.0, 90.0], 5.0, 0.0, 100.0) == [10.0, 50.0, 90.0]
