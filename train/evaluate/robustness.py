"""Robustness: a student's error under corruptions, absolute and relative to a baseline.

Hendrycks & Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations", ICLR 2019.
There the baseline is AlexNet; here it is another student, usually the same network trained on labels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import polars as pl
import torch
from torch import nn

from cache_tools.config import Frozen
from cache_tools.format.recipe import Precision, Preprocessing
from cache_tools.preprocess import prepare
from train.evaluate.corruptions import CORRUPTIONS, KINDS, SEVERITIES
from train.evaluate.metrics import Meter, batches, evaluating

if TYPE_CHECKING:
    from train.evaluate.corruptions import Corrupted


class CorruptionError(Frozen):
    """The errors under one corruption, in [0, 1].

    Attributes:
        by_severity: the student's errors at severities 1 … 5.
        error, baseline_error: means over the severities.
        ce: Σ_s error / Σ_s baseline error; None without a baseline, or if it makes no error.
        relative_ce: Σ_s (error − clean error) / Σ_s (baseline error − baseline clean error); None if the baseline is no
            worse than on clean images.
    """

    corruption: str
    kind: str
    by_severity: tuple[float, ...]
    error: float
    baseline_error: float | None = None
    ce: float | None = None
    relative_ce: float | None = None


class RobustnessSummary(Frozen):
    """The figures of the paper. Those that compare with a baseline are None without one.

    Attributes:
        clean_error, baseline_clean_error: on the same images without corruption.
        mean_error: over corruptions and severities, not normalised.
        mce: mean of `ce` over the corruptions; 1 is as good as the baseline, less is better.
        relative_mce: mean of `relative_ce`, which ignores the clean error, over the `relative_corruptions` corruptions
            that have one. Small denominators make it noisy.
    """

    clean_error: float
    mean_error: float
    baseline_clean_error: float | None = None
    baseline_mean_error: float | None = None
    mce: float | None = None
    relative_mce: float | None = None
    relative_corruptions: int | None = None
    corruptions: tuple[CorruptionError, ...]


def robustness(
    model: nn.Module,
    corrupted: Corrupted,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: Precision = "float32",
    *,
    batch_size: int = 512,
    advance: Callable[[int, str], None] | None = None,
) -> pl.DataFrame:
    """Evaluate a network on every corruption at every severity.

    Args:
        model: on `device`; pixels prepared by `preprocessing` → logits [B, C].
        advance: called after each batch with its number of images and the corruption.

    Returns:
        75 rows: corruption, kind, severity, n, error, nll, ece, brier; error = 1 − top-1, the others as in
        `Evaluation`.

    Raises:
        DivergedError: logits that are not finite.
    """
    labels = torch.from_numpy(corrupted.labels).to(device)
    rows = []
    with evaluating(model, device, precision):
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                meter = Meter(device)
                load = corrupted.loader(name, severity)
                for start, pixels in batches(load, range(len(corrupted)), batch_size, device):
                    meter.update(model(prepare(pixels, preprocessing)), labels[start : start + len(pixels)])
                    if advance is not None:
                        advance(len(pixels), name)
                found = meter.compute()
                wrong = found.n - round(
                    found.n * found.top1
                )  # an integer: relative CE subtracts errors that may be equal
                figures = {"error": wrong / found.n, "nll": found.nll, "ece": found.ece, "brier": found.brier}
                rows.append({"corruption": name, "kind": KINDS[name], "severity": severity, "n": found.n, **figures})
    return pl.DataFrame(rows)


def summarise(
    errors: pl.DataFrame,
    clean_error: float,
    baseline: pl.DataFrame | None = None,
    baseline_clean_error: float | None = None,
) -> RobustnessSummary:
    """Summarise the frames that `robustness` returned for a student and a baseline on the same images.

    Args:
        clean_error, baseline_clean_error: on the same images without corruption, in [0, 1]; the second is required with
            a baseline.
    """
    own = {name: _mean(by_severity) for name, by_severity in _by_corruption(errors).items()}
    plain = {
        name: {"corruption": name, "kind": KINDS[name], "by_severity": by_severity, "error": own[name]}
        for name, by_severity in _by_corruption(errors).items()
    }
    if baseline is None or baseline_clean_error is None:
        rows = tuple(CorruptionError(**plain[name]) for name in CORRUPTIONS)
        return RobustnessSummary(clean_error=clean_error, mean_error=_mean(own.values()), corruptions=rows)
    other = {name: _mean(by_severity) for name, by_severity in _by_corruption(baseline).items()}
    rows = tuple(
        CorruptionError(
            **plain[name],
            baseline_error=other[name],
            ce=_ratio(own[name], other[name]),
            relative_ce=_ratio(own[name] - clean_error, other[name] - baseline_clean_error),
        )
        for name in CORRUPTIONS
    )
    ratios = [row.ce for row in rows if row.ce is not None]
    relative = [row.relative_ce for row in rows if row.relative_ce is not None]
    return RobustnessSummary(
        clean_error=clean_error,
        mean_error=_mean(own.values()),
        baseline_clean_error=baseline_clean_error,
        baseline_mean_error=_mean(other.values()),
        mce=_mean(ratios) if len(ratios) == len(rows) else None,
        relative_mce=_mean(relative) if relative else None,
        relative_corruptions=len(relative),
        corruptions=rows,
    )


def _by_corruption(errors: pl.DataFrame) -> dict[str, tuple[float, ...]]:
    """Corruption → errors at severities 1 … 5."""
    frame = errors.sort("severity").group_by("corruption", maintain_order=True).agg("severity", "error")
    found = {name: tuple(values) for name, severities, values in frame.rows() if tuple(severities) == SEVERITIES}
    assert set(found) == set(CORRUPTIONS), "a frame of robustness() has every corruption at every severity"
    return found


def _ratio(value: float, reference: float) -> float | None:
    """value / reference; None if the reference is negative or no more than rounding."""
    return value / reference if reference > 1e-12 else None


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
