"""Training with a fraction of the labels: which samples keep their label, and what replaces the other labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cache_tools import philox
from cache_tools.analysis.figures import row_chunks
from cache_tools.analysis.pieces import view_pieces
from cache_tools.console import Progress
from cache_tools.format.manifest import Fusion
from cache_tools.reader import TeacherCache

# The counter word of the draw that orders samples; no operation of a view uses this slot.
_SLOT = 0xFFFFFFFE


@dataclass(frozen=True, eq=False)
class PartialLabels:
    """The labels that a run may use.

    Attributes:
        labels: int64 [N], the label of a labelled sample, else the class with the largest target logit in view 0. Loss
            terms that need a class for every sample (DKD, CRD's negatives) use these. The ground truth of unlabelled
            samples is not in them.
        labelled: bool [N], whether a sample is labelled.
    """

    labels: npt.NDArray[np.int64]
    labelled: npt.NDArray[np.bool_]


def labelled_rows(labels: npt.NDArray[np.int64], fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """The samples that keep their label, ascending: `fraction` of each class, rounded, and at least one.

    The order of the draw depends on (seed, sample) alone, so a smaller fraction is a subset of a larger one.
    """
    order = np.argsort(philox.sample_words(seed, np.arange(len(labels), dtype=np.uint64), 0, _SLOT)[0], kind="stable")
    chosen = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        chosen.append(members[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def partial_labels(
    cache: TeacherCache,
    fusion: Fusion,
    labels: npt.NDArray[np.int64],
    samples: npt.NDArray[np.int64] | None,
    fraction: float,
    seed: int,
) -> PartialLabels | None:
    """The labels of the images of a run if it may use `fraction` of them; None if it may use all.

    Args:
        labels: int64 [N], of the images.
        samples: int64 [N], their numbers in the cache; None for all samples of the cache.
    """
    if fraction == 1.0:
        return None
    labelled = np.zeros(len(labels), np.bool_)
    labelled[labelled_rows(labels, fraction, seed)] = True
    largest = np.empty(cache.num_samples, np.int64)
    with Progress("labels from targets", cache.num_samples, "samples") as progress:
        for first, targets in view_pieces(cache, 0, torch.device("cpu"), fusion):
            for rows in row_chunks(len(targets), cache.num_classes):
                largest[first + rows.start : first + rows.stop] = targets.logits(rows).argmax(dim=1).numpy()
                progress.advance(rows.stop - rows.start)
    chosen = largest if samples is None else largest[samples]
    return PartialLabels(np.where(labelled, labels, chosen).astype(np.int64), labelled)
