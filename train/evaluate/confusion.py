"""Which classes a classifier takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from cache_tools.config import Frozen
from cache_tools.plotting import INK, VERMILLION, plain, png, shorten


class ClassFigures(Frozen):
    """One class: `n` samples of it, the share of them that was recognised (recall), and the share of right answers
    among all answers that name it (precision); None where there is nothing to divide by."""

    label: int
    name: str
    n: int
    accuracy: float | None
    precision: float | None


class ConfusedPair(Frozen):
    """`count` samples of class `label` were taken for `predicted`, a `share` of the class."""

    label: str
    predicted: str
    count: int
    share: float


def confusion_matrix(logits: Tensor, labels: Tensor) -> npt.NDArray[np.int64]:
    """Counts int64 [C, C], row = label, column = answer, from logits [N, C] and labels int64 [N] on one device."""
    classes = logits.shape[1]
    counts = torch.bincount(labels * classes + logits.argmax(dim=1), minlength=classes * classes)
    return counts.view(classes, classes).cpu().numpy()


def confusion_frame(matrix: npt.NDArray[np.int64], names: Sequence[str]) -> pl.DataFrame:
    """The matrix as a table: label, label_name, predicted, predicted_name, count, share of the label's samples.

    Zeros are left out except on the diagonal: a thousand classes have a million pairs.
    """
    labels, predicted = np.nonzero((matrix > 0) | np.eye(len(matrix), dtype=bool))
    counts, totals = matrix[labels, predicted], matrix.sum(axis=1)[labels]
    return pl.DataFrame(
        {
            "label": labels,
            "label_name": [names[label] for label in labels.tolist()],
            "predicted": predicted,
            "predicted_name": [names[answer] for answer in predicted.tolist()],
            "count": counts,
            "share": np.divide(counts, totals, out=np.full(len(counts), np.nan), where=totals > 0),
        }
    ).with_columns(pl.col("share").fill_nan(None))


def class_figures(matrix: npt.NDArray[np.int64], names: Sequence[str]) -> tuple[ClassFigures, ...]:
    """Accuracy and precision of each class, in the order of the labels."""
    right, samples, answers = np.diagonal(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    return tuple(
        ClassFigures(
            label=label,
            name=name,
            n=int(samples[label]),
            accuracy=float(right[label] / samples[label]) if samples[label] else None,
            precision=float(right[label] / answers[label]) if answers[label] else None,
        )
        for label, name in enumerate(names)
    )


def confused_pairs(matrix: npt.NDArray[np.int64], names: Sequence[str], most: int = 10) -> tuple[ConfusedPair, ...]:
    """Up to `most` pairs of classes with the most mistakes; of equals, the larger share of its class comes first."""
    wrong = matrix * ~np.eye(len(matrix), dtype=bool)
    shares = wrong / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    order = np.lexsort((-shares.ravel(), -wrong.ravel()))[:most]
    pairs = [divmod(int(place), len(matrix)) for place in order]
    return tuple(
        ConfusedPair(
            label=names[label],
            predicted=names[answer],
            count=int(wrong[label, answer]),
            share=float(shares[label, answer]),
        )
        for label, answer in pairs
        if wrong[label, answer]
    )


_MOST_NUMBERS, _MOST_NAMES, _MOST_PAIRS = 20, 50, 12
_LONGEST_NAME = 18


def plot_confusion(matrix: npt.NDArray[np.int64], names: Sequence[str], title: str) -> bytes:
    """A PNG of counts [C, C], row = label, column = answer.

    Numbers stand in the cells of up to 20 classes, names at the axes of up to 50.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    classes = len(matrix)
    side = 3.6 + 0.27 * min(max(classes, 8), 22)
    layout = ConstrainedLayoutEngine(wspace=0.06)
    figure = Figure(figsize=(side + 4.4, side), dpi=140, layout=layout)
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    left, right = figure.subplots(1, 2, width_ratios=(side - 0.6, 3.4))
    _plot_matrix(left, matrix, names, figure)
    _plot_pairs(right, confused_pairs(matrix, names, _MOST_PAIRS))
    return png(figure)


def _plot_matrix(axes: Any, matrix: npt.NDArray[np.int64], names: Sequence[str], figure: Any) -> None:
    from matplotlib.colors import PowerNorm

    classes = len(matrix)
    percent = 100.0 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # The square root lets a confusion of 1 % be seen beside 99 % that are right.
    image = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="antialiased")
    axes.set_title("Answers, % of each class", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("answer", fontsize=10)
    axes.set_ylabel("class", fontsize=10)
    _name_axes(axes, names)
    if classes <= _MOST_NUMBERS:
        size = 9 if classes <= 12 else 7
        for label, answer in zip(*np.nonzero(matrix), strict=True):
            value = percent[label, answer]
            axes.text(
                answer, label, _percent(value), ha="center", va="center", fontsize=size,
                color="white" if value > 40 else INK,
            )  # fmt: skip
        axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, ticks=(0, 1, 5, 10, 25, 50, 75, 100))
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _name_axes(axes: Any, names: Sequence[str]) -> None:
    classes = len(names)
    if classes <= _MOST_NAMES:
        size = 9 if classes <= 24 else 7
        short = [shorten(name, _LONGEST_NAME) for name in names]
        axes.set_xticks(range(classes), short, rotation=90 if classes > 3 else 0, fontsize=size)
        axes.set_yticks(range(classes), short, fontsize=size)
    else:
        axes.set_xlabel("answer, number of the class", fontsize=10)
        axes.set_ylabel("class, by number", fontsize=10)


def _plot_pairs(axes: Any, pairs: Sequence[ConfusedPair]) -> None:
    axes.set_title("Confused most: images (% of the class)", loc="left", fontsize=10, color=INK)
    axes.set_axis_off()
    if not pairs:
        axes.text(0, 0.97, "nothing", transform=axes.transAxes, va="top", fontsize=9, color=INK)
        return
    longest = max(pair.count for pair in pairs)
    for place, pair in enumerate(pairs):
        axes.barh(place, pair.count / longest, height=0.34, color=VERMILLION, left=0)
        text = " → ".join(shorten(name, _LONGEST_NAME) for name in (pair.label, pair.predicted))
        axes.text(0, place - 0.24, text, va="bottom", fontsize=9, color=INK)
        axes.text(
            pair.count / longest + 0.02, place, f"{pair.count:,} ({100 * pair.share:.1f} %)",
            va="center", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_xlim(0, 1.55)
    axes.set_ylim(max(len(pairs), _MOST_PAIRS) - 0.5, -0.8)


def _percent(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
