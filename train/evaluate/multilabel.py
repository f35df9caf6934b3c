"""Figures of a classifier of images with any number of labels: average precision of each class, and cross entropy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cache_tools.errors import DataError, DivergedError
from cache_tools.format.recipe import Finite, Preprocessing
from cache_tools.images.image_set import ImageSet
from train.evaluate.metrics import Evaluation, predict


class MultiLabelEvaluation(Finite):
    """Figures of one classifier on one split of images with any number of labels.

    Attributes:
        n: samples.
        map: mean average precision in [0, 1], over the classes that an image of the split has.
        bce: mean binary cross entropy over images and classes, in nats.
    """

    n: int = Field(ge=0, lt=1 << 53)
    map: float
    bce: float

    @property
    def headline(self) -> float:
        """The figure that runs are compared by."""
        return self.map


Figures = Evaluation | MultiLabelEvaluation
"""The figures of a run, after the kind of its labels. A result has one of the two."""

# Name of the figure that runs are compared by, in results and tables → on screen.
HEADLINES = {"top1": "top-1", "map": "mAP"}


def headline_of(multi_label: bool) -> str:
    """The name of the figure that runs are compared by."""
    return "map" if multi_label else "top1"


def evaluate_multilabel(
    model: nn.Module, images: ImageSet, preprocessing: Preprocessing, device: torch.device
) -> tuple[MultiLabelEvaluation, dict[str, float]]:
    """Evaluate a network on a split's clean images; its figures, and the average precision of each class with images.

    Raises:
        DivergedError: logits that are not finite.
        DataError: a split without images or without labels, or an image that cannot be decoded.
    """
    logits = predict(model, images, preprocessing, device)
    return multilabel_figures(logits, images.labels, images.class_names)


def multilabel_figures(
    logits: Tensor, labels_NC: npt.NDArray[np.uint8], class_names: tuple[str, ...]
) -> tuple[MultiLabelEvaluation, dict[str, float]]:
    """`evaluate_multilabel` of logits [N, C]."""
    if not bool(torch.isfinite(logits).all()):
        raise DivergedError(
            "the network's logits are not finite",
            expected="numbers",
            found="NaN or infinity",
            next_step="train with a lower learning rate, or without mixed precision",
        )
    if not labels_NC.any():
        raise DataError("no image of the split has a label", next_step="choose another test split")
    scores = logits.double().cpu()
    bce = F.binary_cross_entropy_with_logits(scores, torch.from_numpy(labels_NC).double())
    precisions = average_precisions(scores.numpy(), labels_NC)
    known = {name: float(ap) for name, ap in zip(class_names, precisions, strict=True) if not np.isnan(ap)}
    mean = float(np.mean(list(known.values())))
    return MultiLabelEvaluation(n=len(logits), map=mean, bce=float(bce)), known


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
