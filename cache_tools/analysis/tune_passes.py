"""Passes of `tune-fusion` over the views of a cache, one view in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from cache_tools.analysis.figures import row_chunks, sample_figures
from cache_tools.analysis.tables import bin_sums, calibration_error
from cache_tools.analysis.tune_grid import Factors, log_grid, nll_sums
from cache_tools.config import Frozen
from cache_tools.console import Progress
from cache_tools.format.manifest import Fusion
from cache_tools.fusion import mix
from cache_tools.reader import TeacherCache
from cache_tools.targets import ComponentView, Index

_ALONE_POINTS = 41
_ZOOMS = 2
PASSES = 2 + _ZOOMS


class HeldOutFigures(Frozen):
    """The figures of a way to make targets.

    Attributes:
        name: a description for people.
        nll_chosen_on: mean negative log-likelihood on the part used for the choice, nats.
        nll, nll_error: the same on the held-out part, and its standard error over samples.
        top1, ece: on the held-out part, in [0, 1]; 15 bins.
        difference, difference_error: mean over samples of the held-out NLL minus that of the cache's own setting.
    """

    name: str
    nll_chosen_on: float
    nll: float
    nll_error: float
    top1: float
    ece: float
    difference: float
    difference_error: float


class Setting(HeldOutFigures):
    """A fusion of a teacher and CLIP, and its figures.

    Attributes:
        teacher_weight: None if the logits of one source alone are rescaled.
        clip_scale: multiplies CLIP's cosines; None for the teacher alone.
        teacher_factor, clip_factor: the softmax is over teacher_factor · teacher + clip_factor · clip_scale · cosine.
    """

    teacher_weight: float | None
    clip_scale: float | None
    teacher_factor: float
    clip_factor: float


@dataclass(frozen=True)
class Candidate:
    """A setting to evaluate; `fusion` scales CLIP."""

    name: str
    fusion: Fusion
    factors: Factors
    teacher_weight: float | None = None


class Passes:
    """Passes over the views, one in memory at a time."""

    def __init__(
        self, cache: TeacherCache, views: tuple[int, ...], held: npt.NDArray[np.bool_], device: torch.device
    ) -> None:
        self._cache, self._views, self._held, self._device = cache, views, held, device
        self._choosing = torch.from_numpy(np.flatnonzero(~held)).to(device)
        self._labels = torch.from_numpy(cache.labels).to(device)

    def grid_and_alone(
        self, scaled: Sequence[Fusion], weighted: Sequence[Factors], model: Fusion, progress: Progress
    ) -> tuple[npt.NDArray[np.float64], float, float]:
        """Mean NLL [weighted, scaled], and the factors of teacher alone and CLIP alone (as `model`) with the least NLL.

        The two factors are found on increasingly fine grids around 1: NLL is convex in a factor.
        """
        centres, span, surface = [1.0, 1.0], 1000.0, np.empty((len(weighted), len(scaled)))
        for zoom in range(1 + _ZOOMS):
            grids = [log_grid(centre / span, centre * span, _ALONE_POINTS) for centre in centres]
            alone = [(value, 0.0) for value in grids[0]] + [(0.0, value) for value in grids[1]]
            jobs = [(fusion, weighted) for fusion in scaled] if zoom == 0 else []
            *columns, last = self._mean_nll([*jobs, (model, alone)], progress)
            if zoom == 0:
                surface = np.stack(columns, axis=1)
            centres = [grid[int(nll.argmin())] for grid, nll in zip(grids, np.split(last, 2), strict=True)]
            span = grids[0][1] / grids[0][0]  # the neighbours of the best point enclose the minimum
        return surface, centres[0], centres[1]

    def evaluate(self, candidates: Sequence[Candidate], progress: Progress) -> list[Setting]:
        """Evaluate each candidate on both parts; the second candidate is the cache's own setting."""
        count, views = len(candidates), len(self._views)
        nll = np.zeros((count, self._cache.num_samples))
        right = np.zeros(count)
        bins: list[pl.DataFrame] = []
        for view in self._views:
            targets = self._load(view)
            for rows in row_chunks(self._cache.num_samples, self._cache.num_classes):
                teacher, held = targets.teacher_logits(rows).double(), self._held[rows]
                scaled = _clip_logits(targets, rows, [candidate.fusion for candidate in candidates])
                for (number, candidate), clip in zip(enumerate(candidates), scaled, strict=True):
                    a, b = candidate.factors
                    figures = sample_figures(a * teacher + b * clip.double(), self._labels[rows])
                    nll[number, rows] += figures["nll"].cpu().numpy() / views
                    columns = {name: figures[name].cpu().numpy()[held] for name in ("confidence", "right")}
                    right[number] += columns["right"].sum()
                    bins.append(bin_sums(pl.DataFrame(columns).with_columns(pl.lit(number).alias("source"))))
                progress.advance(rows.stop - rows.start, f"view {view}")
            joined = pl.concat(bins).group_by("source", "bin").agg(pl.col("n", "confidence", "right").sum())
            bins = [joined]
        ece = dict(calibration_error(bins[0], "source").iter_rows())
        top1 = right / (views * self._held.sum())
        return [
            self._setting(candidate, nll[number], nll[1], float(top1[number]), ece[number])
            for number, candidate in enumerate(candidates)
        ]

    def _setting(
        self,
        candidate: Candidate,
        nll: npt.NDArray[np.float64],
        own: npt.NDArray[np.float64],
        top1: float,
        ece: float,
    ) -> Setting:
        difference = (nll - own)[self._held]
        return Setting(
            name=candidate.name,
            teacher_weight=candidate.teacher_weight,
            clip_scale=candidate.fusion.clip_scale if candidate.factors[1] else None,
            teacher_factor=candidate.factors[0],
            clip_factor=candidate.factors[1],
            nll_chosen_on=float(nll[~self._held].mean()),
            nll=float(nll[self._held].mean()),
            nll_error=standard_error(nll[self._held]),
            top1=top1,
            ece=ece,
            difference=float(difference.mean()),
            difference_error=standard_error(difference),
        )

    def _mean_nll(
        self, jobs: Sequence[tuple[Fusion, Sequence[Factors]]], progress: Progress
    ) -> list[npt.NDArray[np.float64]]:
        """The mean NLL of each job's factors, over the views and the samples used for the choice."""
        sums = [torch.zeros(len(factors), dtype=torch.float64, device=self._device) for _, factors in jobs]
        labels = self._labels[self._choosing]
        for view in self._views:
            targets, done = self._load(view), 0
            pieces = list(row_chunks(len(labels), self._cache.num_classes))
            for number, rows in enumerate(pieces, start=1):
                index = self._choosing[rows]
                teacher, scaled = (
                    targets.teacher_logits(index),
                    _clip_logits(targets, index, [fusion for fusion, _ in jobs]),
                )
                for total, clip, (_, factors) in zip(sums, scaled, jobs, strict=True):
                    total += nll_sums(teacher, clip, labels[rows], factors)
                advanced = self._cache.num_samples * number // len(pieces)
                progress.advance(advanced - done, f"view {view}")
                done = advanced
        return [(total / (len(labels) * len(self._views))).cpu().numpy() for total in sums]

    def _load(self, view: int) -> ComponentView:
        targets = self._cache.load_view(view, self._device, logits=False, features=False)
        assert isinstance(targets, ComponentView), "only component caches are tuned"
        return targets


def _clip_logits(targets: ComponentView, index: Index, scaled: Sequence[Fusion]) -> Iterator[torch.Tensor]:
    """The CLIPs' mixed logits [B, C] at each scale, one after the other.

    They are proportional to the scale, so they are computed once, except with the prompt ensemble `probabilities`.
    """
    first = scaled[0]
    if first.prompt_ensemble == "probabilities":
        yield from (replace(targets, fusion=fusion).clip_logits(index) for fusion in scaled)
        return
    unscaled = replace(targets, fusion=replace(first, clip_scales=(1.0,) * len(first.clip_scales)))
    parts = [unscaled.clip_logits(index, number) for number in range(len(first.clip_scales))]
    for fusion in scaled:
        yield mix([scale * part for scale, part in zip(fusion.clip_scales, parts, strict=True)], fusion.clip_weights)


def standard_error(values: npt.NDArray[np.float64]) -> float:
    """The standard error of the mean; 0 for a single value, whose error is unknown."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
