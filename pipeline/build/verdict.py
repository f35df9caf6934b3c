"""Stop a build whose networks would make a useless cache, with the reason and the setting that helps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cache_tools.errors import PreflightError
from cache_tools.images.class_names import describe
from cache_tools.images.image_set import ImageSet
from cache_tools.images.sources import has_image_files
from pipeline.build.judge import Judgement, better_order, judge, share_in_best_order

if TYPE_CHECKING:
    from pipeline.networks.clip import Clip
    from pipeline.networks.ensemble import TeacherEnsemble
    from pipeline.networks.teachers import Teacher

SKIP = "`--set preflight_samples=0` skips this check"
_ORDER_NAMES = {"sorted": "sorted order", "natural": "natural order (2 before 10)", "case-blind": "case-blind order"}


@dataclass(frozen=True, eq=False)
class Sample:
    """The labelled images of a preflight; `labels` int64 [N]."""

    images: ImageSet
    labels: npt.NDArray[np.int64]

    def __str__(self) -> str:
        return f"{len(self.labels):,} images of {len(self.images.class_names)} classes"


def judge_networks(ensemble: TeacherEnsemble, sample: Sample, predictions: npt.NDArray[np.int64]) -> Iterator[str]:
    """Judge the networks that have a weight in the fusion, by their predictions int64 [teachers + CLIPs, N].

    Yields:
        Notes about networks for which the sample is too small to tell.

    Raises:
        PreflightError: a network is useless, or a teacher's classes are in another order.
    """
    fusion, count = ensemble.fusion, len(ensemble.teachers)
    for number, teacher in enumerate(ensemble.teachers):
        if max(fusion.teacher_weight, fusion.feature_weight) * fusion.teacher_weights[number] > 0.0:
            yield from _judge_teacher(teacher, number, count, sample, predictions[number])
    for number, clip in enumerate(ensemble.clips):
        if max(1.0 - fusion.teacher_weight, 1.0 - fusion.feature_weight) * fusion.clip_weights[number] > 0.0:
            instead = "leave it out with clip: null" if ensemble.teachers else "use a teacher that was trained on them"
            yield from _judge_clip(clip, number, len(ensemble.clips), sample, predictions[count + number], instead)


def _judge_teacher(
    teacher: Teacher, number: int, count: int, sample: Sample, predicted: npt.NDArray[np.int64]
) -> Iterator[str]:
    names = sample.images.class_names
    found = judge(sample.labels, predicted, len(names), "teacher")
    where = teacher.identity.architecture + _which("teacher", number, count)
    key = f"teacher.{number}.classes" if count > 1 else "teacher.classes"
    order = better_order(names, sample.labels, predicted, teacher.identity.outputs)
    if order is not None:
        setting = f"set {key}={order.name}"
        if count == 1 and has_image_files(sample.images.name):
            setting += f", or dataset.class_order={order.name} to number the dataset's classes so"
        raise PreflightError(
            "the teacher was trained with the classes in another order than it is used in",
            where=where,
            expected=f"{order.right / found.n:.1%} right on {sample}, with its outputs in "
            f"{_ORDER_NAMES.get(order.name, f'{order.name} order')}",
            found=f"{_percent(found)} as they are",
            next_step=f"{setting}; {SKIP}",
        )
    if found.refused:
        if _is_constant(predicted):
            raise _constant("the teacher", where, sample, predicted, "check its weights, mean and std")
        share = share_in_best_order(sample.labels, predicted, len(names))
        advice = "check its weights, mean and std, and the order of its classes"
        if share is not None:
            advice = (
                f"put its outputs into the order of its own classes: with the best order it has {share:.1%} right. "
                f"Name them in that order with {key}=FILE, one class name per line"
            )
        raise PreflightError(
            "the teacher is no better than chance, so its targets would be useless",
            where=where,
            expected=_expected(found, sample),
            found=_percent(found),
            next_step=f"{advice}; {SKIP}",
        )
    if not found.better:
        yield _undecided(f"the teacher ({where})" if count > 1 else "the teacher", found, sample)


def _judge_clip(
    clip: Clip, number: int, count: int, sample: Sample, predicted: npt.NDArray[np.int64], instead: str
) -> Iterator[str]:
    found = judge(sample.labels, predicted, len(sample.images.class_names), "clip")
    identity = clip.identity
    where = identity.architecture + _which("CLIP", number, count)
    key = f"clip.{number}.class_names" if count > 1 else "clip.class_names"
    if found.refused:
        if _is_constant(predicted):
            step = f"check its weights, its tokenizer and {key}, or {instead}"
            raise _constant("CLIP", where, sample, predicted, step)
        prompt = identity.templates[0].replace("{}", identity.class_names[0])
        raise PreflightError(
            "CLIP is no better than chance, so it knows nothing of these classes",
            where=where,
            expected=_expected(found, sample),
            found=f"{_percent(found)}, with prompts such as '{prompt}'",
            next_step=f"give it English words that describe the classes: {key}, a list or a file with one per line in "
            f"the order of {describe(sample.images.class_names)}. If CLIP does not know such images at all, "
            f"{instead}; {SKIP}",
        )
    if not found.better:
        yield _undecided(f"CLIP ({where})" if count > 1 else "CLIP", found, sample)


def _is_constant(predicted: npt.NDArray[np.int64]) -> bool:
    return len(predicted) > 1 and bool((predicted == predicted[0]).all())


def _constant(who: str, where: str, sample: Sample, predicted: npt.NDArray[np.int64], next_step: str) -> PreflightError:
    return PreflightError(
        f"{who} gives the same class for every image, which is no better than chance",
        where=where,
        expected=f"different classes for {sample}",
        found=f"'{sample.images.class_names[int(predicted[0])]}' for each of them",
        next_step=f"{next_step}; {SKIP}",
    )


def _expected(found: Judgement, sample: Sample) -> str:
    return f"top-1 of at least {found.needed / found.n:.1%} on {sample}, where chance gives {found.chance:.1%}"


def _undecided(who: str, found: Judgement, sample: Sample) -> str:
    chance = f"which so few images cannot tell from chance ({found.chance:.1%})"
    return f"{who} has {found.right:,} of {sample} right, {chance}"


def _percent(found: Judgement) -> str:
    return f"{found.right / found.n:.1%}"


def _which(what: str, number: int, count: int) -> str:
    return f", {what} {number + 1} of {count}" if count > 1 else ""
