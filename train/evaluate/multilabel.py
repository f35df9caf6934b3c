"""Figures of a classifier of images with any number of labels: average precision of each class, and cross entropy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cache_tools.analysis.average_precision import average_precisions
from cache_tools.config import Frozen
from cache_tools.errors import DataError, DivergedError
from cache_tools.format.recipe import Finite, Preprocessing
from cache_tools.images.image_set import ImageSet
from cache_tools.system.joined import Joined
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


class LabelFigures(Frozen):
    """Figures of one label, over the images of a split.

    Attributes:
        n: images that have the label.
        average_precision: None for a label that no image has.
        recall: share of these images to which the network gives the label (probability 0.5 or more); None without any.
        precision: share of right ones among the images to which it gives the label; None if it gives it to none.
    """

    label: int
    name: str
    n: int
    average_precision: float | None
    precision: float | None
    recall: float | None


Figures = Evaluation | MultiLabelEvaluation
"""The figures of a run, after the kind of its labels. A result has one of the two."""

# Name of the figure that runs are compared by, in results and tables → on screen.
HEADLINES = {"top1": "top-1", "map": "mAP"}


def headline_of(multi_label: bool) -> str:
    """The name of the figure that runs are compared by."""
    return "map" if multi_label else "top1"


def evaluate_multilabel(
    model: nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    ranks: Joined | None = None,
) -> tuple[MultiLabelEvaluation, dict[str, float]]:
    """Evaluate a network on a split's clean images; its figures, and the average precision of each class with images.

    Raises:
        DivergedError: logits that are not finite.
        DataError: a split without images or without labels, or an image that cannot be decoded.
    """
    logits = predict(model, images, preprocessing, device, ranks=ranks)
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


def label_figures(
    logits: Tensor, labels_NC: npt.NDArray[np.uint8], class_names: tuple[str, ...]
) -> tuple[LabelFigures, ...]:
    """Figures of each label, in the order of the classes, from logits [N, C]."""
    scores = logits.double().cpu().numpy()
    has, given = labels_NC == 1, scores >= 0.0  # a probability of 0.5 or more
    right = (has & given).sum(axis=0)

    def share(count: int, of: int) -> float | None:
        return count / of if of else None

    return tuple(
        LabelFigures(
            label=label,
            name=name,
            n=int(has[:, label].sum()),
            average_precision=None if np.isnan(precision) else float(precision),
            precision=share(int(right[label]), int(given[:, label].sum())),
            recall=share(int(right[label]), int(has[:, label].sum())),
        )
        for label, (name, precision) in enumerate(zip(class_names, average_precisions(scores, labels_NC), strict=True))
    )
