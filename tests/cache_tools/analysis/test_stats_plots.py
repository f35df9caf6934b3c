"""The plots of `cache-tools stats` show the numbers of the tables; plots that do not apply are left out."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from cache_tools.analysis.stats import TeacherStats, analyse
from cache_tools.analysis.stats_plots import (
    NAMED_CLASSES,
    draw_consistency,
    draw_gains,
    draw_quadrants,
    draw_reliability,
    draw_stability,
    plot_all,
)
from cache_tools.analysis.tables import QUADRANTS
from cache_tools.plotting import new_figure, shorten
from tests.support.stats_case import CHOICE, CONFIDENT, labelled_images, write_cache

ALL = {"quadrants.png", "reliability.png", "class_gains.png", "consistency.png", "stability.png"}


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> TeacherStats:
    cache = write_cache(tmp_path_factory.mktemp("plots") / "c.zarr", labelled_images(), store="components")
    return analyse(cache, confident=CONFIDENT, choice=CHOICE)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> TeacherStats:
    """More classes than get a line each."""
    images = labelled_images(NAMED_CLASSES // 2)
    images = dataclasses.replace(images, class_names=tuple(f"number {n}" for n in range(2 * NAMED_CLASSES)))
    rng = np.random.default_rng(0)
    images = dataclasses.replace(images, labels=np.arange(60) % 50, keys=images.keys[rng.permutation(60)])
    cache = write_cache(tmp_path_factory.mktemp("plots") / "m.zarr", images, store="components")
    return analyse(cache, choice=CHOICE)


def overall(stats: TeacherStats, source: str) -> dict[str, Any]:
    (row,) = stats.summary.filter((pl.col("source") == source) & pl.col("view").is_null()).to_dicts()
    return row


def words(figure: Any) -> str:
    texts = [text.get_text() for axes in figure.axes for text in [*axes.texts, axes.title, axes.get_xaxis().label]]
    return "\n".join([*texts, *[text.get_text() for text in figure.texts], figure.get_suptitle()])


@pytest.mark.medium
def test_every_plot_is_written_and_names_dataset_and_threshold(stats: TeacherStats, tmp_path: Path) -> None:
    assert {path.name for path in plot_all(stats, tmp_path)} == ALL
    for name in ALL:
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG"
            assert image.width >= 1200
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    for draw in (draw_quadrants, draw_reliability, draw_gains, draw_consistency, draw_stability):
        assert "digits/train, 60 samples × 3 views; confident: probability ≥ 0.6" in words(draw(stats))


def test_quadrant_bars_are_the_shares(stats: TeacherStats) -> None:
    (axes,) = draw_quadrants(stats).axes
    widths = np.array([bar.get_width() for bar in axes.patches]).reshape(3, 4)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["fusion", "CLIP", "teacher"], "drawn upwards: the teacher stands on top"
    for row, source in zip(widths, ("fusion", "clip", "teacher"), strict=True):
        assert row == pytest.approx([100 * overall(stats, source)[name] for name in QUADRANTS])


def test_reliability_bars_are_accuracies(stats: TeacherStats) -> None:
    figure = draw_reliability(stats)
    for axes, source in zip(figure.axes[:3], ("teacher", "clip", "fusion"), strict=True):
        table = stats.reliability.filter((pl.col("source") == source) & pl.col("view").is_null() & (pl.col("n") > 0))
        accuracy, gap = axes.containers
        assert [bar.get_height() for bar in accuracy] == pytest.approx(table["accuracy"].to_list())
        assert [bar.get_y() + bar.get_height() for bar in gap] == pytest.approx(table["confidence"].to_list())
        assert f"ECE {overall(stats, source)['ece']:.4f}" in axes.get_title(loc="left")


def test_gains_are_sorted_and_classes_without_samples_left_out(stats: TeacherStats) -> None:
    (axes,) = draw_gains(stats).axes
    gains = [bar.get_width() for bar in axes.containers[0]]
    table = stats.classes.drop_nulls("gain_over_teacher").sort("gain_over_teacher", descending=True)
    assert gains == pytest.approx((100 * table["gain_over_teacher"]).to_list())
    assert [label.get_text() for label in axes.get_yticklabels()] == table["class"].to_list()
    assert len(gains) == len(stats.classes) - 1


def test_many_classes_are_ranked_and_only_extremes_named(many: TeacherStats) -> None:
    table = many.classes.drop_nulls("gain_over_teacher").sort("gain_over_teacher", descending=True)
    figure = draw_gains(many)
    assert [bar.get_height() for bar in figure.axes[0].containers[0]] == pytest.approx(
        (100 * table["gain_over_teacher"]).to_list()
    )
    assert table["class"][0] in words(figure)
    assert table["class"][-1] in words(figure)


def test_consistency_dots_are_the_consistencies_of_the_classes(stats: TeacherStats) -> None:
    (axes,) = draw_consistency(stats).axes
    table = stats.classes.drop_nulls("fusion_consistency").sort("fusion_consistency", descending=True)
    assert 0 < len(table) < len(stats.classes)
    for line, source in zip(axes.lines, ("teacher", "clip", "fusion"), strict=True):
        assert line.get_xdata() == pytest.approx(table[f"{source}_consistency"].to_list())


def test_stability_bars_are_shares(stats: TeacherStats) -> None:
    left, right = draw_stability(stats).axes
    assert [bar.get_height() for bar in left.patches] == pytest.approx((100 * stats.stability["same_top1"]).to_list())
    for line, source in zip(right.lines, ("teacher", "clip", "fusion"), strict=True):
        assert line.get_xdata() == pytest.approx(np.sort(stats.samples[f"{source}_divergence"]), abs=1e-6)


def test_a_fused_cache_and_a_single_view_have_fewer_plots(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "f.zarr", labelled_images(), store="fused")
    for name in ALL:
        (tmp_path / name).write_text("from an earlier run")
    written = plot_all(analyse(cache, [0]), tmp_path)
    assert {path.name for path in written} == ALL - {"class_gains.png", "stability.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == {path.name for path in written}


def test_class_names_are_not_read_as_formulae() -> None:
    assert shorten("a $5 bill and a $10 bill") == r"a \$5 bill and a \$10 b…"
    assert shorten("cat") == "cat"
    new_figure(4, 3, r"$\foo{$", r"folder/$\foo{$").savefig(io.BytesIO())
