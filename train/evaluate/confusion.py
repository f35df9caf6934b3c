"""The confusions of a classifier: the matrix, figures by class, the most frequent mistakes, and a plot of them."""

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

# Of the plot: numbers in the cells, names at the axes, confusions in the list.
_MAX_CLASSES_WITH_NUMBERS, _MAX_CLASSES_WITH_NAMES, _MAX_LISTED = 20, 50, 12
_MAX_NAME_LENGTH = 18


class ClassFigures(Frozen):
    """Figures of one class.

    Attributes:
        n: number of its samples.
        accuracy: fraction of them that was recognised (recall); None without samples.
        precision: fraction of right answers among all that name this class; None if none does.
    """

    label: int
    name: str
    n: int
    accuracy: float | None
    precision: float | None


class Confusion(Frozen):
    """`count` samples of class `label`, a `share` of the class, were classified as `predicted`."""

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


def most_confused(matrix: npt.NDArray[np.int64], names: Sequence[str], most: int = 10) -> tuple[Confusion, ...]:
    """Up to `most` confusions with the highest counts; of equal counts, the larger share comes first."""
    wrong = matrix * ~np.eye(len(matrix), dtype=bool)
    shares = wrong / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    order = np.lexsort((-shares.ravel(), -wrong.ravel()))[:most]
    cells = [divmod(int(place), len(matrix)) for place in order]
    return tuple(
        Confusion(
            label=names[label],
            predicted=names[answer],
            count=int(wrong[label, answer]),
            share=float(shares[label, answer]),
        )
        for label, answer in cells
        if wrong[label, answer]
    )


def plot_confusion(matrix: npt.NDArray[np.int64], names: Sequence[str], title: str) -> bytes:
    """A PNG of counts [C, C], row = label, column = answer.

    Up to 20 classes have numbers in the cells, and up to 50 have names at the axes.
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
    _list_confusions(right, most_confused(matrix, names, _MAX_LISTED))
    return png(figure)


def _plot_matrix(axes: Any, matrix: npt.NDArray[np.int64], names: Sequence[str], figure: Any) -> None:
    from matplotlib.colors import PowerNorm

    classes = len(matrix)
    percent = 100.0 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # On a square-root scale a confusion of 1 % is visible beside 99 % right answers.
    image = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="antialiased")
    axes.set_title("Answers, % of each class", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("answer", fontsize=10)
    axes.set_ylabel("class", fontsize=10)
    _name_axes(axes, names)
    if classes <= _MAX_CLASSES_WITH_NUMBERS:
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
    if classes <= _MAX_CLASSES_WITH_NAMES:
        size = 9 if classes <= 24 else 7
        short = [shorten(name, _MAX_NAME_LENGTH) for name in names]
        axes.set_xticks(range(classes), short, rotation=90 if classes > 3 else 0, fontsize=size)
        axes.set_yticks(range(classes), short, fontsize=size)
    else:
        axes.set_xlabel("answer, number of the class", fontsize=10)
        axes.set_ylabel("class, by number", fontsize=10)


def _list_confusions(axes: Any, confusions: Sequence[Confusion]) -> None:
    axes.set_title("Most confused: images (% of the class)", loc="left", fontsize=10, color=INK)
    axes.set_axis_off()
    if not confusions:
        axes.text(0, 0.97, "nothing", transform=axes.transAxes, va="top", fontsize=9, color=INK)
        return
    longest = max(confusion.count for confusion in confusions)
    for place, confusion in enumerate(confusions):
        axes.barh(place, confusion.count / longest, height=0.34, color=VERMILLION, left=0)
        text = " → ".join(shorten(name, _MAX_NAME_LENGTH) for name in (confusion.label, confusion.predicted))
        axes.text(0, place - 0.24, text, va="bottom", fontsize=9, color=INK)
        axes.text(
            confusion.count / longest + 0.02, place, f"{confusion.count:,} ({100 * confusion.share:.1f} %)",
            va="center", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_xlim(0, 1.55)
    axes.set_ylim(max(len(confusions), _MAX_LISTED) - 0.5, -0.8)


def _percent(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
