"""Average precision of classes, for images with any number of labels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def average_precisions(scores_NC: npt.NDArray[np.float64], labels_NC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Average precision of each class, [C]; NaN for a class that no sample has.

    AP = Σ_k (recall_k − recall_{k−1}) · precision_k over the distinct scores, falling, as in scikit-learn: no
    interpolation, and samples of one score are one step.
    """
    return np.array(
        [_average_precision(scores, labels) for scores, labels in zip(scores_NC.T, labels_NC.T, strict=True)]
    )


def _average_precision(scores: npt.NDArray[np.float64], labels: npt.NDArray[np.uint8]) -> float:
    positives = int(labels.sum())
    if positives == 0:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    last_of_score = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    hits = np.cumsum(labels[order], dtype=np.int64)[last_of_score]
    precision = hits / (last_of_score + 1)
    return float(np.sum(np.diff(hits, prepend=0) * precision) / positives)
