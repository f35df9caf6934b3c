"""Measure the accuracy of teachers and CLIPs on a labelled sample before hours of forward passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from cache_tools.config import Frozen
from cache_tools.console import Progress
from cache_tools.format.arrays import array_name
from cache_tools.images.classes import missing_notes
from cache_tools.images.image_set import ImageSet
from pipeline.build.verdict import Sample, judge_networks

if TYPE_CHECKING:
    import torch

    from cache_tools.format.recipe import Preprocessing
    from pipeline.networks.ensemble import EnsembleOutput, TeacherEnsemble
    from train.evaluate.canvas import ImagesInTest


class Preflight(Frozen):
    """Top-1 accuracies in [0, 1] on `n` clean labelled images of `split`; stored in the cache's provenance.

    `teacher_top1` and `clip_top1` are those of the weighted mean of each group, None for a missing group; without a
    second group there is no `fusion_top1` either. `networks` has every single network, as `teacher`, `teacher_2`, …,
    `clip`, `clip_2`, … `notes` are what a reader of the figures should know.
    """

    teacher_top1: float | None = None
    clip_top1: float | None = None
    fusion_top1: float | None = None
    networks: dict[str, float] = Field(default_factory=dict)
    split: str
    n: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        sources = (("teacher", self.teacher_top1), ("CLIP", self.clip_top1), ("fusion", self.fusion_top1))
        figures = [f"{name} {top1:.2%}{self._each(name.lower())}" for name, top1 in sources if top1 is not None]
        return f"top-1 on {self.n:,} clean images of the {self.split} split: {', '.join(figures)}"

    @property
    def lost_by_fusion(self) -> str | None:
        """That the fusion is worse than the teacher or CLIP alone, in a sentence; None if it is not."""
        if self.teacher_top1 is None or self.clip_top1 is None or self.fusion_top1 is None:
            return None
        best, name = max((self.teacher_top1, "the teacher"), (self.clip_top1, "CLIP"))
        lost = 100 * (best - self.fusion_top1)
        return f"The fusion is {lost:.2f} points below {name} alone on these images." if lost > 0 else None

    def _each(self, group: str) -> str:
        """The accuracies of the members of a group, in brackets; empty for a group of one."""
        members = [top1 for name, top1 in self.networks.items() if name.startswith(group)]
        return f" ({', '.join(f'{top1:.2%}' for top1 in members)})" if len(members) > 1 else ""


def run_preflight(
    ensemble: TeacherEnsemble,
    images: ImageSet,
    limit: int,
    batch_size: int,
    tested: Preprocessing | None = None,
    for_clip: ImagesInTest | None = None,
) -> Preflight:
    """Measure every network, both groups and their fusion on up to `limit` evenly spaced clean samples.

    Networks whose weight in the fusion is 0 are measured, but not judged.

    Args:
        tested: the preprocessing of tests, which take a part of each canvas; None for whole canvases.
        for_clip: the same images for CLIP, if it gets them at another size.

    Raises:
        PreflightError: outputs are not finite, a network is no better than chance (`pipeline.build.judge`), or a
            teacher would be far better with its outputs in another order of the classes.
    """
    import torch

    from pipeline.networks.ensemble import clean_batches, evenly_spaced, require_finite

    index = evenly_spaced(images, limit)
    labels = images.labels[index]
    batches: list[torch.Tensor] = []
    with Progress("preflight", len(index), "images") as progress:
        for rows, pixels in clean_batches(images, index, batch_size, ensemble.device, tested, for_clip):
            output = ensemble.outputs(*pixels)
            require_finite(ensemble, output)
            batches.append(_predictions(ensemble, output))
            progress.advance(len(rows))
    predictions = torch.cat(batches, dim=1).cpu().numpy()
    shares = (predictions == labels).mean(axis=1).tolist()
    names = [array_name("teacher", number) for number in range(len(ensemble.teachers))]
    names += [array_name("clip", number) for number in range(len(ensemble.clips))]
    sample = Sample(images, labels)
    notes = [*missing_notes(images), *judge_networks(ensemble, sample, predictions[-len(names) :])]
    return Preflight(
        **{f"{source}_top1": share for source, share in zip(ensemble.sources, shares, strict=False)},
        networks=dict(zip(names, shares[-len(names) :], strict=True)),
        split=images.split,
        n=len(index),
        notes=tuple(notes),
    )


def _predictions(ensemble: TeacherEnsemble, output: EnsembleOutput) -> torch.Tensor:
    """int64 [sources + networks, B]: classes predicted by each of the ensemble's `sources`, then by each network."""
    import torch

    logits = ensemble.source_logits(*output)
    logits += [teacher.logits for teacher in output.teachers] + ensemble.scaled_logits(output.clips)
    return torch.stack([each.argmax(1) for each in logits])
