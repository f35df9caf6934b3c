"""The plot of robustness shows the data of the frames, with and without a baseline."""

from __future__ import annotations

import io

import numpy as np
import polars as pl
import pytest
from PIL import Image

from tests.support.turns import slow
from train.evaluate.corruptions import CORRUPTIONS, SEVERITIES
from train.evaluate.robustness import summarise
from train.evaluate.robustness_plot import plot_robustness

pytestmark = pytest.mark.medium


def frame(errors: np.ndarray) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {"corruption": name, "severity": severity, "error": float(errors[c, s])}
            for c, name in enumerate(CORRUPTIONS)
            for s, severity in enumerate(SEVERITIES)
        ]
    )


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def share(image: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(image - np.array(colour)).max(axis=2) < 12).mean())


def test_a_baseline_adds_a_second_line() -> None:
    rng = np.random.default_rng(0)
    own, other = frame(rng.uniform(0, 0.5, (15, 5))), frame(rng.uniform(0.4, 0.9, (15, 5)))
    alone = pixels(plot_robustness(own, summarise(own, 0.05), "alone", num_classes=10))
    both = pixels(plot_robustness(own, summarise(own, 0.05, other, 0.1), "both", num_classes=10, baseline=other))
    assert alone.shape[1] == both.shape[1] == 1750
    blue, vermillion = (0, 114, 178), (213, 94, 0)
    assert share(alone, blue) > 0.002
    assert share(alone, vermillion) == 0.0
    assert share(both, vermillion) > 0.002


@pytest.mark.parametrize("number", [slow(0), 7, slow(14)])
def test_every_panel_shows_its_own_errors(number: int) -> None:
    """A corruption's errors change its own panel and no other."""
    base = np.full((15, 5), 0.3)
    plain = frame(base)
    before = pixels(plot_robustness(plain, summarise(plain, 0.3), "t", num_classes=10))
    errors = base.copy()
    errors[number] = 0.8
    changed = frame(errors)
    after = pixels(plot_robustness(changed, summarise(changed, 0.3), "t", num_classes=10))
    rows, columns = np.nonzero((before != after).any(axis=2))
    height, width = before.shape[:2]
    assert int(rows.mean() // (height / 3)) == number // 5
    assert int(columns.mean() // (width / 5)) == number % 5
    assert np.ptp(rows) < height / 3
    assert np.ptp(columns) < width / 5


def test_dollar_signs_in_names_are_no_formulas() -> None:
    errors, name = frame(np.full((15, 5), 0.3)), r"$\foo{$"
    summary = summarise(errors, 0.3, errors, 0.3)
    names = {"student_name": name, "baseline_name": name}
    assert plot_robustness(errors, summary, name, num_classes=10, baseline=errors, **names).startswith(b"\x89PNG")
