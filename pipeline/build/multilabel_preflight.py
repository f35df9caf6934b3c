"""Measure teachers on images with any number of labels before hours of forward passes: mean average precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cache_tools.config import Frozen
from cache_tools.console import Progress
from cache_tools.errors import PreflightError
from cache_tools.format.arrays import array_name
from cache_tools.images.classes import missing_notes
from cache_tools.images.image_set import ImageSet

if TYPE_CHECKING:
    from cache_tools.format.recipe import Preprocessing
    from pipeline.networks.ensemble import TeacherEnsemble

SHUFFLES = 200
CONFIDENCE = 0.95


class MultiLabelPreflight(Frozen):
    """Mean average precision in [0, 1] on `n` clean labelled images of `split`; stored in the cache's provenance.

    Attributes:
        teacher_map: of the weighted mean of the teachers.
        chance_map: of the same teachers when the labels of the images are shuffled, the mean of 200 times.
        networks: of each teacher, as `teacher`, `teacher_2`, …
        notes: what a reader of the figures should know.
    """

    teacher_map: float
    chance_map: float
    networks: dict[str, float]
    split: str
    n: int
    notes: tuple[str, ...] = ()

    @property
    def lost_by_fusion(self) -> str | None:
        """As of `Preflight`; there is no fusion here."""
        return None

    def __str__(self) -> str:
        each = f" ({', '.join(f'{value:.2%}' for value in self.networks.values())})" if len(self.networks) > 1 else ""
        return (
            f"mAP on {self.n:,} clean images of the {self.split} split: teacher {self.teacher_map:.2%}{each}, "
            f"by chance {self.chance_map:.2%}"
        )


def run_multilabel_preflight(
    ensemble: TeacherEnsemble, images: ImageSet, limit: int, batch_size: int, tested: Preprocessing | None = None
) -> MultiLabelPreflight:
    """Measure every teacher and their mean on up to `limit` evenly spaced clean samples.

    Args:
        tested: the preprocessing of students, which are tested on a part of each canvas; None for whole canvases.

    Raises:
        PreflightError: outputs are not finite, or a teacher is no better than with shuffled labels: wrong weights,
            class order or normalisation.
    """
    import torch

    from cache_tools.analysis.average_precision import average_precisions
    from pipeline.networks.ensemble import clean_batches, evenly_spaced, require_finite

    index = evenly_spaced(images, limit)
    labels = images.labels[index]
    if not labels.any():
        raise PreflightError(
            "no image of the preflight sample has a label",
            where=f"{images.name}, split {images.split}",
            next_step="check the table of labels; `--set preflight_samples=0` skips this check",
        )
    rows = []
    with Progress("preflight", len(index), "images") as progress:
        for part, pixels in clean_batches(images, index, batch_size, ensemble.device, tested):
            output = ensemble.outputs(*pixels)
            require_finite(ensemble, output)
            teachers = output.teachers
            rows.append(torch.stack([ensemble.teacher_logits(teachers), *(each.logits.float() for each in teachers)]))
            progress.advance(len(part))
    mixed, *each = torch.cat(rows, dim=1).double().cpu().numpy()
    chance = _by_chance(mixed, labels)
    result = MultiLabelPreflight(
        teacher_map=_mean(average_precisions(mixed, labels)),
        chance_map=float(np.mean(chance)),
        networks={
            array_name("teacher", number): _mean(average_precisions(logits, labels))
            for number, logits in enumerate(each)
        },
        split=images.split,
        n=len(index),
        notes=missing_notes(images),
    )
    bound = float(np.quantile(chance, CONFIDENCE))
    for number, teacher in enumerate(ensemble.teachers):
        found = result.networks[array_name("teacher", number)]
        if found > bound or found == 1.0:  # a perfect teacher passes however small the sample is
            continue
        raise PreflightError(
            "the teacher is no better than chance, so its targets would be useless",
            where=teacher.identity.architecture,
            expected=f"mAP above {bound:.1%}, which 95 % of {SHUFFLES} shufflings of the labels of {len(index)} images "
            "do not reach",
            found=f"{found:.1%}",
            next_step="check its weights, class order, mean and std; `--set preflight_samples=0` skips this check",
        )
    return result


def _by_chance(logits: npt.NDArray[np.float64], labels: npt.NDArray[np.uint8]) -> list[float]:
    from cache_tools.analysis.average_precision import average_precisions

    generator = np.random.default_rng(0)
    return [_mean(average_precisions(logits, generator.permutation(labels))) for _ in range(SHUFFLES)]


def _mean(precisions: npt.NDArray[np.float64]) -> float:
    return float(np.nanmean(precisions))
