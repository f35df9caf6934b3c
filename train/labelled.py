"""Which samples of a split keep their label when only a part of them may be used, and what stands in for the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cache_tools import philox
from cache_tools.format.manifest import Fusion
from cache_tools.reader import TeacherCache

# Counter word of the draw that orders samples: no view has an operation in that slot.
_SLOT = 0xFFFFFFFE


@dataclass(frozen=True, eq=False)
class PartialLabels:
    """What a run knows of its samples' classes.

    Attributes:
        labels: int64 [N]: the label where `labelled`, elsewhere the class that the targets of view 0 favour. Terms that
            need some class for every sample (DKD's target class, CRD's negatives) use these; no unlabelled sample's
            ground truth is in them.
        labelled: bool [N].
    """

    labels: npt.NDArray[np.int64]
    labelled: npt.NDArray[np.bool_]


def labelled_rows(labels: npt.NDArray[np.int64], fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """Samples that keep their label, ascending: `fraction` of each class, rounded, and at least one.

    Samples are put in an order that depends on (seed, sample) alone, so a smaller fraction is a part of a larger one.
    """
    order = np.argsort(philox.sample_words(seed, np.arange(len(labels), dtype=np.uint64), 0, _SLOT)[0], kind="stable")
    chosen = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        chosen.append(members[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def partial_labels(cache: TeacherCache, fusion: Fusion, fraction: float, seed: int) -> PartialLabels | None:
    """The labels of a cache's samples when `fraction` of them may be used; None for all of them."""
    if fraction == 1.0:
        return None
    labelled = np.zeros(cache.num_samples, np.bool_)
    labelled[labelled_rows(cache.labels, fraction, seed)] = True
    targets = cache.load_view(0, features=False, fusion=fusion)
    favoured = targets.logits(slice(None)).argmax(dim=1).numpy()
    return PartialLabels(np.where(labelled, cache.labels, favoured).astype(np.int64), labelled)
