"""Means and intervals equal textbook values; Pareto fronts equal a slow check of the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.report.spread import interval_factor, pareto_front, spread


def test_textbook_interval() -> None:
    """t(0.975, 2) = 4.3027: mean 2, std 1, half the interval 4.3027 ⁄ √3."""
    found = spread([1.0, 2.0, 3.0])
    assert (found.n, found.mean, found.std) == (3, 2.0, 1.0)
    assert found.low == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-5)
    assert found.high == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-5)


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (5, 2.77645), (31, 2.04227), (1001, 1.96234)])
def test_interval_factors_equal_the_t_table(n: int, t: float) -> None:
    assert interval_factor(n) == pytest.approx(t / math.sqrt(n), rel=1e-5)


def test_one_value_has_no_interval() -> None:
    found = spread([0.9])
    assert (found.n, found.mean, found.std, found.low, found.high) == (1, 0.9, None, None, None)


def test_intervals_are_clipped_to_the_bounds() -> None:
    found = spread([0.90, 0.99], bounds=(0.0, 1.0))
    assert found.high == 1.0
    assert 0.0 < found.low < 0.9  # type: ignore[operator]


def test_intervals_cover_the_mean_in_95_percent_of_samples() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(3.0, 2.0, (4000, 4))
    found = [spread(row.tolist()) for row in samples]
    covered = np.mean([row.low < 3.0 < row.high for row in found])  # type: ignore[operator]
    assert covered == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


POINTS = st.lists(
    st.tuples(
        st.one_of(st.none(), st.integers(1, 6).map(float)), st.one_of(st.none(), st.integers(0, 6).map(lambda k: k / 6))
    ),
    max_size=12,
)


@given(POINTS)
def test_the_front_is_every_point_that_no_other_beats(points: list[tuple[float | None, float | None]]) -> None:
    front = pareto_front([cost for cost, _ in points], [value for _, value in points])
    whole = [(cost, value) for cost, value in points if cost is not None and value is not None]
    for (cost, value), found in zip(points, front, strict=True):
        if cost is None or value is None:
            assert found is None
            continue
        beaten = any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in whole)
        assert found is not beaten
