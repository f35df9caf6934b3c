"""Mean and interval over seeds, and the Pareto front of students."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean of n values; for n ≥ 2 also their standard deviation (n − 1) and the 95 % confidence interval of the mean.

    The interval is Student's, mean ± t(0.975, n − 1) · std ⁄ √n: it assumes a normal distribution.
    """

    n: int
    mean: float
    std: float | None = None
    low: float | None = None
    high: float | None = None


def spread(values: Sequence[float], bounds: tuple[float, float] = (-math.inf, math.inf)) -> Spread:
    """The spread of at least one finite value.

    Args:
        bounds: range of possible means. The interval, which is wide for few values, is clipped to it.
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Spread(n=1, mean=mean)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = interval_factor(n) * std
    return Spread(n=n, mean=mean, std=std, low=max(mean - half, bounds[0]), high=min(mean + half, bounds[1]))


def interval_factor(n: int) -> float:
    """Half the 95 % confidence interval of the mean of n ≥ 2 values, in standard deviations: t(0.975, n − 1) ⁄ √n."""
    from scipy.special import stdtrit  # a dependency of scikit-learn; slow to import

    return float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) / math.sqrt(n)


def pareto_front(costs: Sequence[float | None], values: Sequence[float | None]) -> list[bool | None]:
    """Whether each entry is on the Pareto front.

    An entry is on it unless another has at most its cost and at least its value, one of them strictly better. Equal
    entries are on the front together. None where cost or value is unknown.
    """
    points = [
        None if cost is None or value is None else (cost, -value) for cost, value in zip(costs, values, strict=True)
    ]
    front, best = set(), math.inf
    for point in sorted({point for point in points if point is not None}):
        if point[1] < best:
            front.add(point)
            best = point[1]
    return [None if point is None else point in front for point in points]
