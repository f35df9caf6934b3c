"""Which classes a classifier takes for which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from cache_tools.config import Frozen


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
