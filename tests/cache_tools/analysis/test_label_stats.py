"""Statistics of caches of images with any number of labels, recomputed with numpy and scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from sklearn.metrics import average_precision_score, log_loss, precision_score, recall_score
from typer.testing import CliRunner

from cache_tools.analysis.label_stats import LabelStats, analyse_labels
from cache_tools.cli import app
from cache_tools.errors import RecipeError
from cache_tools.reader import TeacherCache
from pipeline.build.cache import build_cache
from tests.support import multilabel, tiny_build

UNSEEN = "violet"  # a label that no image has
CLASSES, IMAGES, VIEWS = (*multilabel.CLASSES, UNSEEN), 64, 2
Array = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    root = tmp_path_factory.mktemp("multilabel")
    table = multilabel.write_squares(root / "squares") / "labels.csv"
    head, *rows = table.read_text().splitlines()
    table.write_text("\n".join([f"{head},{UNSEEN}", *(f"{row},0" for row in rows)]))
    tiny_build.write_teacher(root / "teacher.safetensors", CLASSES)
    return TeacherCache.open(build_cache(multilabel.build_recipe(root, root / "squares.zarr")).path)


@pytest.fixture(scope="module")
def found(cache: TeacherCache) -> LabelStats:
    return analyse_labels(cache, confident=0.6, temperature=0.5)


@pytest.fixture(scope="module")
def p(cache: TeacherCache) -> Array:
    """Probabilities [V, N, C] at temperature 0.5."""
    logits = [cache.load_view(view).logits(slice(None)).double().numpy() for view in range(VIEWS)]
    return 1 / (1 + np.exp(-np.stack(logits) / 0.5))


def calibration_error(p: Array, labels: npt.NDArray[Any]) -> float:
    """The mean over decisions of the gap of their bin."""
    total = 0.0
    for low in range(15):
        inside = (p >= low / 15) & ((p < (low + 1) / 15) | (low == 14))
        if inside.any():
            total += inside.sum() * abs(labels[inside].mean() - p[inside].mean())
    return total / p.size


def test_figures_of_views(cache: TeacherCache, found: LabelStats, p: Array) -> None:
    labels = cache.labels
    rows = {row["view"]: row for row in found.summary.to_dicts()}
    for view in range(VIEWS):
        against = np.where(labels == 1, 1 - p[view], p[view])
        expected = {
            "view": view,
            "n": IMAGES,
            "map": average_precision_score(labels[:, :-1], p[view][:, :-1], average="macro"),
            "bce": np.mean([log_loss(labels[:, c], p[view, :, c], labels=[0, 1]) for c in range(len(CLASSES))]),
            "ece": calibration_error(p[view], labels),
            "labels": labels.sum() / IMAGES,
            "given": (p[view] >= 0.5).sum() / IMAGES,
            "wrong": np.mean((p[view] >= 0.5) != labels),
            "confident_wrong": np.mean(against >= 0.6),
        }
        assert rows[view] == pytest.approx(expected)
    both = np.tile(labels, (VIEWS, 1, 1))
    assert rows[None]["n"] == VIEWS * IMAGES
    assert rows[None]["ece"] == pytest.approx(calibration_error(p, both))
    for name in ("map", "bce", "given", "wrong", "confident_wrong"):
        assert rows[None][name] == pytest.approx((rows[0][name] + rows[1][name]) / 2)


def test_figures_of_labels(cache: TeacherCache, found: LabelStats, p: Array) -> None:
    both, given = np.tile(cache.labels, (VIEWS, 1)), (p >= 0.5).reshape(-1, len(CLASSES))
    *rows, unseen = found.classes.to_dicts()
    assert (unseen["class"], unseen["n"], unseen["precision"]) == (UNSEEN, 0, 0.0 if given[:, -1].any() else None)
    assert (unseen["average_precision"], unseen["recall"], unseen["with"]) == (None, None, None)
    for c, row in enumerate(rows):
        has = cache.labels[:, c] == 1
        precisions = [average_precision_score(cache.labels[:, c], p[view, :, c]) for view in range(VIEWS)]
        precision = precision_score(both[:, c], given[:, c]) if given[:, c].any() else None
        assert (row["label"], row["class"], row["n"]) == (c, CLASSES[c], has.sum())
        assert row["average_precision"] == pytest.approx(np.mean(precisions))
        assert row["precision"] == (None if precision is None else pytest.approx(precision))
        assert row["recall"] == pytest.approx(recall_score(both[:, c], given[:, c]))
        assert (row["with"], row["without"]) == pytest.approx((p[:, has, c].mean(), p[:, ~has, c].mean()))


def test_suspicious_decisions(cache: TeacherCache, found: LabelStats, p: Array) -> None:
    mean, wrong = p.mean(axis=0), ((p >= 0.5) != cache.labels).sum(axis=0)
    against = np.where(cache.labels == 1, 1 - mean, mean)
    pairs = sorted(
        ((-against[n, c], n, c) for n in range(IMAGES) for c in range(len(CLASSES)) if wrong[n, c]), key=lambda one: one
    )
    rows = found.suspicious.to_dicts()
    assert [(row["sample"], row["label"]) for row in rows] == [(n, c) for _, n, c in pairs]
    for row in rows:
        place = row["sample"], row["label"]
        assert (row["class"], row["has"]) == (CLASSES[place[1]], bool(cache.labels[place]))
        assert row["probability"] == pytest.approx(mean[place])
        assert row["views_against"] == wrong[place]


def test_the_bins_hold_every_decision(found: LabelStats, p: Array) -> None:
    assert found.reliability["n"].sum() == p.size
    total = (found.reliability["n"] * found.reliability["probability"]).sum()
    assert total == pytest.approx(p.sum())


def test_the_command(cache: TeacherCache, found: LabelStats, tmp_path: Path) -> None:
    options = ["--confident", "0.6", "--temperature", "0.5", "--device", "cpu"]
    arguments = ["stats", str(cache.path), *options, "--out", str(tmp_path / "stats")]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"}, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    tables, _, notes = shown.stdout.partition("decision: ")
    assert max(map(len, tables.splitlines())) <= 80
    overall = found.summary.filter(pl.col("view").is_null()).to_dicts()[0]
    assert f"{100 * overall['map']:.2f} %" in tables
    assert f"{overall['bce']:.4f}" in tables
    for row in found.suspicious.head(3).to_dicts():
        views = [str(row["views_against"]), "of", str(VIEWS)]
        expected = [str(row["sample"]), row["class"], "yes" if row["has"] else "no", f"{row['probability']:.3f}"]
        assert [*expected, *views] in [line.split() for line in tables.splitlines()]
    assert f"next: train-student --loss bce --cache {cache.path}" in notes.replace("\n", " ")
    printed = CliRunner().invoke(app, ["stats", str(cache.path), *options, "--json"], catch_exceptions=False)
    assert json.loads(printed.stdout) == json.loads((tmp_path / "stats" / "stats.json").read_text())
    assert json.loads(printed.stdout)["summary"][-1]["map"] == pytest.approx(overall["map"])
    assert pl.read_parquet(tmp_path / "stats" / "classes.parquet").equals(found.classes)


@pytest.mark.parametrize("bad", [{"confident": 1.0}, {"temperature": 0.0}])
def test_bad_settings_are_refused(cache: TeacherCache, bad: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"bad --{next(iter(bad))}"):
        analyse_labels(cache, **bad)
