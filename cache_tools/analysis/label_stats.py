"""Statistics of a cache of images with any number of labels: what its teachers say of each (image, label).

A decision is whether an image has a label; there are images × labels of them, and a sigmoid gives each a probability.
No model runs. Views are read one at a time; docs/analysis.md explains each figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
import torch.nn.functional as F

from cache_tools.analysis.average_precision import average_precisions
from cache_tools.analysis.figures import row_chunks
from cache_tools.analysis.stats import About, about_of, check_confident, check_temperature, label_views
from cache_tools.analysis.tables import CALIBRATION_BINS
from cache_tools.console import Progress, resolve_device
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice
from cache_tools.targets import ViewTargets

STORED_SUSPICIOUS = 1000


@dataclass(frozen=True)
class LabelStats:
    """Tables of statistics. Shares, probabilities and precisions are in [0, 1]; cross entropy is in nats per decision.

    Attributes:
        summary: one row per view, and one over all (`view` null), whose figures are the means of the views: `n` images,
            `map`, `bce`, `ece`, `labels` and `given` (labels per image, as they are and with a probability of 0.5 or
            more), `wrong` and `confident_wrong` (shares of decisions).
        reliability: one row per bin of the probability, over all views: `n` decisions, mean `probability`, `has`.
        classes: one row per label, over all views: `n` images, `average_precision` (mean of the views), `precision`
            and `recall` at a probability of 0.5, mean probability of images `with` and `without` the label.
        suspicious: the decisions, wrong in at least one view, that the targets contradict most: `sample`, `label`,
            `class`, `has` (the label as it is), `probability` (mean of the views) and `views_against`.
    """

    about: About
    summary: pl.DataFrame
    reliability: pl.DataFrame
    classes: pl.DataFrame
    suspicious: pl.DataFrame

    def tables(self) -> dict[str, pl.DataFrame]:
        """The tables, by the names of their files."""
        names = ("summary", "reliability", "classes", "suspicious")
        return {name: getattr(self, name) for name in names}

    def to_dict(self, rows: int = 20) -> dict[str, Any]:
        """Plain JSON, with the `rows` most suspicious decisions."""
        tables = {**self.tables(), "suspicious": self.suspicious.head(rows)}
        return {"about": self.about.model_dump(mode="json")} | {name: t.to_dicts() for name, t in tables.items()}


def analyse_labels(
    cache: TeacherCache,
    views: Iterable[int] | None = None,
    *,
    confident: float = 0.8,
    temperature: float = 1.0,
    choice: FusionChoice | None = None,
    device: str = "cpu",
) -> LabelStats:
    """`stats.analyse` for a cache of images with any number of labels; arguments and errors are the same.

    Views that mix two images are refused: a mixed image has the labels of both, each in part.

    Needs memory for one view and for three [N, C] arrays.
    """
    check_confident(confident)
    check_temperature(temperature)
    chosen = label_views(cache, views, "these figures are of the labels")
    fusion = (choice or FusionChoice()).resolve(cache)
    on = resolve_device(device, needs_float64=True)
    sums = _Sums(cache, confident)
    with Progress("stats", len(chosen) * cache.num_samples, "samples") as progress:
        for view in chosen:
            targets = cache.load_view(view, on, features=False, fusion=fusion)
            sums.add(view, _scaled_logits(targets, cache, temperature, progress, f"view {view}"))
    return LabelStats(
        about=about_of(cache, chosen, (cache.recipe.only_group or "fusion",), confident, temperature, fusion),
        summary=sums.summary(),
        reliability=sums.reliability(),
        classes=sums.classes(),
        suspicious=sums.suspicious(STORED_SUSPICIOUS),
    )


def _scaled_logits(
    targets: ViewTargets, cache: TeacherCache, temperature: float, progress: Progress, note: str
) -> npt.NDArray[np.float64]:
    """The logits of a view, divided by the temperature, float64 [N, C]."""
    pieces = []
    for rows in row_chunks(cache.num_samples, cache.num_classes):
        pieces.append((targets.logits(rows).double() / temperature).cpu().numpy())
        progress.advance(rows.stop - rows.start, note)
    return np.concatenate(pieces)


class _Sums:
    """What is added up over the views."""

    def __init__(self, cache: TeacherCache, confident: float) -> None:
        self._names, self._confident = cache.class_names, confident
        self._has = cache.labels.astype(bool)
        shape = self._has.shape
        self._views = 0
        self._probability, self._against = np.zeros(shape), np.zeros(shape, np.int32)
        self._given = np.zeros(shape[1], np.int64)
        self._right = np.zeros(shape[1], np.int64)
        self._precisions: list[npt.NDArray[np.float64]] = []
        self._bins = np.zeros((3, CALIBRATION_BINS))
        self._rows: list[dict[str, Any]] = []

    def add(self, view: int, logits: npt.NDArray[np.float64]) -> None:
        """Add the logits [N, C] of a view."""
        has = self._has
        p = torch.from_numpy(logits).sigmoid().numpy()
        given = logits >= 0.0
        contradiction = np.where(has, 1.0 - p, p)
        precisions = average_precisions(logits, has.astype(np.uint8))
        bins = _bins(p, has)
        self._views += 1
        self._probability += p
        self._against += given != has
        self._given += given.sum(axis=0)
        self._right += (given & has).sum(axis=0)
        self._precisions.append(precisions)
        self._bins += bins
        cross_entropy = F.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(has).double())
        self._rows.append(
            {
                "view": view,
                "n": len(has),
                "map": float(np.nanmean(precisions)) if has.any() else None,
                "bce": float(cross_entropy),
                "ece": _calibration_error(bins),
                "labels": float(has.sum(axis=1).mean()),
                "given": float(given.sum(axis=1).mean()),
                "wrong": float((given != has).mean()),
                "confident_wrong": float((contradiction >= self._confident).mean()),
            }
        )

    def summary(self) -> pl.DataFrame:
        views = pl.DataFrame(self._rows, schema_overrides={"view": pl.Int64, "map": pl.Float64})
        overall = views.select(pl.lit(None, pl.Int64).alias("view"), pl.col("n").sum(), pl.exclude("view", "n").mean())
        ece = pl.lit(_calibration_error(self._bins)).alias("ece")
        return pl.concat([views, overall.with_columns(ece).select(views.columns)])

    def reliability(self) -> pl.DataFrame:
        n, probability, has = self._bins
        edges = np.arange(CALIBRATION_BINS + 1) / CALIBRATION_BINS
        table = pl.DataFrame({"low": edges[:-1], "high": edges[1:], "n": n.astype(np.int64)})
        means = {"probability": probability / np.maximum(n, 1), "has": has / np.maximum(n, 1)}
        return table.with_columns(
            pl.when(pl.col("n") > 0).then(pl.Series(values)).alias(name) for name, values in means.items()
        )

    def classes(self) -> pl.DataFrame:
        has, p = self._has, self._probability / self._views
        n, images = has.sum(axis=0), len(has)
        return pl.DataFrame(
            {
                "label": np.arange(len(self._names)),
                "class": list(self._names),
                "n": n,
                "average_precision": np.mean(self._precisions, axis=0),
                "precision": _shares(self._right, self._given),
                "recall": _shares(self._right, n * self._views),
                "with": _shares((p * has).sum(axis=0), n),
                "without": _shares((p * ~has).sum(axis=0), images - n),
            }
        ).with_columns(pl.col(pl.Float64).fill_nan(None))

    def suspicious(self, count: int) -> pl.DataFrame:
        p = self._probability / self._views
        against = np.where(self._against > 0, np.where(self._has, 1.0 - p, p), -1.0).ravel()
        count = min(count, int((against >= 0.0).sum()))
        most = np.argsort(-against, kind="stable")[:count]
        samples, labels = np.unravel_index(most, self._has.shape)
        return pl.DataFrame(
            {
                "sample": samples,
                "label": labels,
                "class": pl.Series([self._names[label] for label in labels.tolist()], dtype=pl.String),
                "has": self._has[samples, labels],
                "probability": p[samples, labels],
                "views_against": self._against[samples, labels],
            }
        )


def _bins(p: npt.NDArray[np.float64], has: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """[3, bins]: decisions, Σ probability and Σ has, by bin of the probability: [k/15, (k+1)/15), the last closed."""
    number = np.minimum((p * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1).ravel()
    weights: Sequence[npt.NDArray[Any] | None] = (None, p.ravel(), has.ravel().astype(np.float64))
    return np.stack([np.bincount(number, weight, CALIBRATION_BINS).astype(np.float64) for weight in weights])


def _calibration_error(bins: npt.NDArray[np.float64]) -> float:
    """Σ_b n_b/n · |share that has the label − mean probability|."""
    n, probability, has = bins
    return float(np.abs(has - probability).sum() / n.sum())


def _shares(counts: npt.NDArray[Any], totals: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.divide(counts, totals, out=np.full(len(totals), np.nan), where=totals > 0)
