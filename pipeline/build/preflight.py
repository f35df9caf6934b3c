"""Measure the accuracy of teachers and CLIPs on a labelled sample before hours of forward passes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from cache_tools.config import Frozen
from cache_tools.console import Progress
from cache_tools.errors import PreflightError
from cache_tools.format.arrays import array_name
from cache_tools.images.image_set import ImageSet

if TYPE_CHECKING:
    import torch

    from pipeline.networks.ensemble import EnsembleOutput, TeacherEnsemble


class Preflight(Frozen):
    """Top-1 accuracies in [0, 1] on `n` clean labelled images of `split`; stored in the cache's provenance.

    `teacher_top1` and `clip_top1` are those of the weighted mean of each group. `networks` has every single network, as
    `teacher`, `teacher_2`, …, `clip`, `clip_2`, …
    """

    teacher_top1: float
    clip_top1: float
    fusion_top1: float
    networks: dict[str, float] = Field(default_factory=dict)
    split: str
    n: int

    def __str__(self) -> str:
        return (
            f"top-1 on {self.n:,} clean images of the {self.split} split: "
            f"teacher {self.teacher_top1:.2%}{self._each('teacher')}, "
            f"CLIP {self.clip_top1:.2%}{self._each('clip')}, fusion {self.fusion_top1:.2%}"
        )

    def _each(self, group: str) -> str:
        """The accuracies of the members of a group, in brackets; empty for a group of one."""
        members = [top1 for name, top1 in self.networks.items() if name.startswith(group)]
        return f" ({', '.join(f'{top1:.2%}' for top1 in members)})" if len(members) > 1 else ""


def run_preflight(ensemble: TeacherEnsemble, images: ImageSet, limit: int, batch_size: int) -> Preflight:
    """Measure every network, both groups and their fusion on up to `limit` evenly spaced clean samples.

    Raises:
        PreflightError: a teacher is no better than chance: wrong weights, class order or normalisation.
    """
    import torch

    from pipeline.networks.ensemble import clean_batches, evenly_spaced

    index = evenly_spaced(images, limit)
    correct: list[torch.Tensor] = []
    with Progress("preflight", len(index), "images") as progress:
        for rows, pixels in clean_batches(images, index, batch_size, ensemble.device):
            labels = torch.from_numpy(images.labels[rows]).to(ensemble.device)
            correct.append((_predictions(ensemble, ensemble.outputs(pixels)) == labels).sum(1))
            progress.advance(len(rows))
    teacher_top1, clip_top1, fusion_top1, *each = (torch.stack(correct).sum(0).double() / len(index)).tolist()
    names = [array_name("teacher", number) for number in range(len(ensemble.teachers))]
    names += [array_name("clip", number) for number in range(len(ensemble.clips))]
    result = Preflight(
        teacher_top1=teacher_top1,
        clip_top1=clip_top1,
        fusion_top1=fusion_top1,
        networks=dict(zip(names, each, strict=True)),
        split=images.split,
        n=len(index),
    )
    _check_teachers(result, len(images.class_names), ensemble)
    return result


def _predictions(ensemble: TeacherEnsemble, output: EnsembleOutput) -> torch.Tensor:
    """int64 [3 + networks, B]: classes predicted by the teachers, the CLIPs, their fusion, and then each network."""
    import torch

    fused, _ = ensemble.fuse(*output)
    logits = [ensemble.teacher_logits(output.teachers), ensemble.clip_logits(output.clips), fused]
    logits += [teacher.logits for teacher in output.teachers] + ensemble.scaled_logits(output.clips)
    return torch.stack([each.argmax(1) for each in logits])


def _check_teachers(result: Preflight, num_classes: int, ensemble: TeacherEnsemble) -> None:
    """Raise PreflightError unless every teacher is two standard deviations of random guessing above 1/C."""
    chance = 1.0 / num_classes
    bound = chance + 2.0 * math.sqrt(chance * (1.0 - chance) / result.n)
    for number, teacher in enumerate(ensemble.teachers):
        top1 = result.networks[array_name("teacher", number)]
        if top1 > bound:
            continue
        which = f", teacher {number + 1} of {len(ensemble.teachers)}" if len(ensemble.teachers) > 1 else ""
        raise PreflightError(
            "the teacher is no better than chance, so its targets would be useless",
            where=f"{teacher.identity.architecture}{which}",
            expected=f"top-1 above {bound:.1%} on {result.n} images of {num_classes} classes",
            found=f"{top1:.1%}",
            next_step="check its weights, class order, mean and std; `--set preflight_samples=0` skips this check",
        )
