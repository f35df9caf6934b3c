"""Before hours of forward passes: are these teachers any good on a labelled sample?"""

from __future__ import annotations

import math

import numpy as np
import torch

from cache_tools.config import Frozen
from cache_tools.console import Progress
from cache_tools.errors import PreflightError
from cache_tools.images import ImageSet
from pipeline.targets import TeacherPair, clean_batches, labelled_sample


class Preflight(Frozen):
    """Top-1 accuracies in [0, 1] on `n` clean labelled images of `split`; stored in the cache's provenance."""

    teacher_top1: float
    clip_top1: float
    fusion_top1: float
    split: str
    n: int

    def __str__(self) -> str:
        return (
            f"top-1 on {self.n:,} clean images of the {self.split} split: "
            f"teacher {self.teacher_top1:.2%}, CLIP {self.clip_top1:.2%}, fusion {self.fusion_top1:.2%}"
        )


def run_preflight(pair: TeacherPair, images: ImageSet, limit: int, batch_size: int) -> Preflight:
    """Measure teacher, CLIP and their fusion on up to `limit` evenly spaced clean samples.

    Raises:
        PreflightError: the teacher is no better than chance (wrong weights, wrong class order or wrong normalisation).
    """
    index = labelled_sample(images, limit)
    correct: list[torch.Tensor] = []
    with Progress("preflight", len(index), "images") as progress:
        for pixels, rows in zip(
            clean_batches(images, index, batch_size, pair.device),
            np.split(index, range(batch_size, len(index), batch_size)),
            strict=True,
        ):
            labels = torch.from_numpy(images.labels[rows]).to(pair.device)
            teacher, clip = pair.outputs(pixels)
            fused, _ = pair.fuse(teacher, clip)
            guesses = torch.stack([teacher.logits.argmax(1), clip.cosine.argmax(1), fused.argmax(1)])
            correct.append((guesses == labels).sum(1))
            progress.advance(len(rows))
    teacher_top1, clip_top1, fusion_top1 = (torch.stack(correct).sum(0).double() / len(index)).tolist()
    result = Preflight(
        teacher_top1=teacher_top1,
        clip_top1=clip_top1,
        fusion_top1=fusion_top1,
        split=images.split,
        n=len(index),
    )
    _refuse_chance(result, len(images.class_names), pair)
    return result


def _refuse_chance(result: Preflight, num_classes: int, pair: TeacherPair) -> None:
    """Two standard deviations of a guesser above 1/C is the least a teacher must reach."""
    chance = 1.0 / num_classes
    bound = chance + 2.0 * math.sqrt(chance * (1.0 - chance) / result.n)
    if result.teacher_top1 > bound:
        return
    raise PreflightError(
        "the teacher is no better than chance, so its cache would be worth nothing",
        where=pair.teacher.identity.architecture,
        expected=f"top-1 above {bound:.1%} on {result.n} images of {num_classes} classes",
        found=f"{result.teacher_top1:.1%}",
        next_step="check its weights, the order of its classes and its mean and std; "
        "`--set preflight_samples=0` builds regardless",
    )
