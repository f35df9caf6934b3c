"""Agreement of a student with its teachers on test images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cache_tools.config import Frozen
from cache_tools.errors import NotFoundError
from cache_tools.format.recipe import Precision, Preprocessing
from cache_tools.images.image_set import ImageSet
from cache_tools.refusion import FusionChoice
from cache_tools.system import named
from cache_tools.system.devices import float64_device, in_float64
from pipeline.networks.ensemble import TeacherEnsemble, clean_batches
from pipeline.networks.stored import load_stored_ensemble
from train.evaluate.canvas import ImagesInTest
from train.evaluate.multilabel import multilabel_figures
from train.runs.stored import StoredRun

_NAMES = {"teacher": "teacher", "clip": "CLIP", "fusion": "fusion"}


class Agreement(Frozen):
    """A student compared with one source of targets on `n` images; shares in [0, 1].

    Attributes:
        source: `teacher`, `CLIP` or `fusion`.
        top1: of the source itself.
        agreement: share of images for which both predict the same class.
        kl: mean KL(source ‖ student) at temperature 1, in nats.
        wrong: number of images for which the source is wrong.
        follows_when_wrong: share of these for which the student predicts the same wrong class; None if there are none.
        right_when_wrong: share of these for which the student is right; None if there are none.
    """

    source: str
    n: int
    top1: float
    agreement: float
    kl: float
    wrong: int
    follows_when_wrong: float | None
    right_when_wrong: float | None


class LabelAgreement(Frozen):
    """A student compared with one source of targets on `n` images with any number of labels; shares in [0, 1].

    A decision is whether an image has a label: a probability of 0.5 or more. There are images × classes of them.

    Attributes:
        source: `teacher`; CLIP cannot teach such images.
        map: mean average precision of the source itself.
        agreement: share of decisions that are the same.
        kl: mean KL(source ‖ student) of a decision at temperature 1, in nats.
        wrong: share of decisions in which the source is wrong.
        right_when_wrong: share of these in which the student is right; None if there are none.
    """

    source: str
    n: int
    map: float
    agreement: float
    kl: float
    wrong: float
    right_when_wrong: float | None


def load_teachers(
    run: StoredRun, images: ImageSet, device: torch.device, precision: Precision | None = None
) -> TeacherEnsemble:
    """Load the networks of the cache that a run was trained from, fused as the run fused them.

    Args:
        images: the teachers are loaded for their classes and canvas size.
        precision: of the forward passes; None for the cache's own.

    Raises:
        NotFoundError: the run was trained on labels alone, or the cache does not record how its teachers were loaded.
        WeightsError: weights are missing, or not those that the cache was built with.
    """
    manifest = run.manifest
    if manifest is None:
        raise NotFoundError("a run on labels alone has no teachers", where=run.folder, next_step="leave --teachers out")
    fusion = None
    if run.recipe.fusion != FusionChoice():
        from cache_tools.reader import TeacherCache

        assert run.cache is not None, "a run with a manifest had a cache"
        if isinstance(run.cache, str) and not named.is_named("stores", run.cache):
            raise NotFoundError(
                "the cache of this run is in a store that you have not named",
                where=run.folder,
                found=run.cache,
                next_step=f"if you trust it, run `cache-tools info {run.cache}` once",
            )
        fusion = run.recipe.fusion.resolve(TeacherCache.open(run.cache))
    return load_stored_ensemble(
        manifest,
        images,
        device,
        where=run.folder,
        fusion=fusion,
        precision=precision,
        alternative="leave --teachers out",
    )


def agreement(
    student_NC: Tensor,
    ensemble: TeacherEnsemble,
    images: ImageSet,
    batch_size: int = 256,
    advance: Callable[[int], None] | None = None,
    tested: Preprocessing | None = None,
    for_clip: ImagesInTest | None = None,
) -> tuple[Agreement, ...]:
    """Compare a student with teacher, CLIP and fusion, or with the only one of them that there is.

    Args:
        student_NC: its logits for the clean `images`, float32 [N, C] on the teachers' device.
        advance: called with the number of images after each batch.
        tested: the preprocessing of tests, which take a part of each canvas; None for whole canvases.
        for_clip: the same images for CLIP, if it gets them at another size.
    """
    labels = torch.from_numpy(images.labels).to(student_NC.device)
    sums = torch.zeros(len(ensemble.sources), 6, dtype=torch.float64, device=float64_device(student_NC.device))
    for rows, sources in _source_logits(ensemble, images, batch_size, advance, tested, for_clip):
        sums += torch.stack([_counts(student_NC[rows], source, labels[rows]) for source in sources])
    return tuple(_figures(_NAMES[name], *row) for name, row in zip(ensemble.sources, sums.tolist(), strict=True))


def label_agreement(
    student_NC: Tensor,
    ensemble: TeacherEnsemble,
    images: ImageSet,
    batch_size: int = 256,
    advance: Callable[[int], None] | None = None,
    tested: Preprocessing | None = None,
    for_clip: ImagesInTest | None = None,
) -> tuple[LabelAgreement, ...]:
    """`agreement` on images with any number of labels."""
    batches = [sources for _, sources in _source_logits(ensemble, images, batch_size, advance, tested, for_clip)]
    by_source = [torch.cat(list(batch)) for batch in zip(*batches, strict=True)]
    return tuple(
        _label_figures(_NAMES[name], student_NC, source, images)
        for name, source in zip(ensemble.sources, by_source, strict=True)
    )


def _label_figures(name: str, student: Tensor, source: Tensor, images: ImageSet) -> LabelAgreement:
    student, source = in_float64(student).cpu(), in_float64(source).cpu()
    labels = torch.from_numpy(images.labels).bool()
    evaluation, _ = multilabel_figures(source, images.labels, images.class_names)
    kl = sum(
        F.logsigmoid(sign * source).exp() * (F.logsigmoid(sign * source) - F.logsigmoid(sign * student))
        for sign in (1.0, -1.0)
    )
    own, other = student >= 0.0, source >= 0.0
    wrong = other != labels
    return LabelAgreement(
        source=name,
        n=len(images),
        map=evaluation.map,
        agreement=float((own == other).double().mean()),
        kl=float(torch.as_tensor(kl).mean()),
        wrong=float(wrong.double().mean()),
        right_when_wrong=float((own == labels)[wrong].double().mean()) if wrong.any() else None,
    )


def _source_logits(
    ensemble: TeacherEnsemble,
    images: ImageSet,
    batch_size: int,
    advance: Callable[[int], None] | None,
    tested: Preprocessing | None,
    for_clip: ImagesInTest | None,
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Batches of images: their rows, and the logits of each source."""
    for index, pixels in clean_batches(images, np.arange(len(images)), batch_size, ensemble.device, tested, for_clip):
        yield slice(index[0], index[-1] + 1), ensemble.source_logits(*ensemble.outputs(*pixels))
        if advance is not None:
            advance(len(index))


def _counts(student: Tensor, source: Tensor, labels: Tensor) -> Tensor:
    """float64 [6]: images, source right, same prediction, Σ KL, same wrong prediction, only the student right."""
    student, source = in_float64(student), in_float64(source)
    labels, own, other = labels.to(student.device), student.argmax(1), source.argmax(1)
    log_student, log_source = student.log_softmax(1), source.log_softmax(1)
    kl = F.kl_div(log_student, log_source, reduction="sum", log_target=True)
    right, same = other == labels, own == other
    counts = (torch.ones_like(right), right, same, same & ~right, (own == labels) & ~right)
    n, right_n, same_n, follows, corrects = (count.sum().double() for count in counts)
    return torch.stack([n, right_n, same_n, kl, follows, corrects])


def _figures(source: str, n: float, right: float, same: float, kl: float, follows: float, corrects: float) -> Agreement:
    wrong = n - right
    return Agreement(
        source=source,
        n=int(n),
        top1=right / n,
        agreement=same / n,
        kl=kl / n,
        wrong=int(wrong),
        follows_when_wrong=follows / wrong if wrong else None,
        right_when_wrong=corrects / wrong if wrong else None,
    )
