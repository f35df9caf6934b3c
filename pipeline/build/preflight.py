"""Measure the accuracy of teachers and CLIPs on a labelled sample before hours of forward passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from cache_tools.config import Frozen
from cache_tools.console import Progress
from cache_tools.format.arrays import array_name
from cache_tools.images.classes import missing_note
from cache_tools.images.image_set import ImageSet
from pipeline.build.verdict import Sample, judge_networks

if TYPE_CHECKING:
    import torch

    from pipeline.networks.ensemble import EnsembleOutput, TeacherEnsemble


class Preflight(Frozen):
    """Top-1 accuracies in [0, 1] on `n` clean labelled images of `split`; stored in the cache's provenance.

    `teacher_top1` and `clip_top1` are those of the weighted mean of each group. `networks` has every single network, as
    `teacher`, `teacher_2`, …, `clip`, `clip_2`, … `notes` are what a reader of the figures should know.
    """

    teacher_top1: float
    clip_top1: float
    fusion_top1: float
    networks: dict[str, float] = Field(default_factory=dict)
    split: str
    n: int
    notes: tuple[str, ...] = ()

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

    Networks whose weight in the fusion is 0 are measured, but not judged.

    Raises:
        PreflightError: a network is no better than chance (`pipeline.build.judge`), or a teacher would be far better
            with its outputs in another order of the classes.
    """
    import torch

    from pipeline.networks.ensemble import clean_batches, evenly_spaced

    index = evenly_spaced(images, limit)
    labels = images.labels[index]
    batches: list[torch.Tensor] = []
    with Progress("preflight", len(index), "images") as progress:
        for rows, pixels in clean_batches(images, index, batch_size, ensemble.device):
            batches.append(_predictions(ensemble, ensemble.outputs(pixels)))
            progress.advance(len(rows))
    predictions = torch.cat(batches, dim=1).cpu().numpy()
    teacher_top1, clip_top1, fusion_top1, *each = (predictions == labels).mean(axis=1).tolist()
    names = [array_name("teacher", number) for number in range(len(ensemble.teachers))]
    names += [array_name("clip", number) for number in range(len(ensemble.clips))]
    sample = Sample(images, labels)
    notes = [*missing_note(images), *judge_networks(ensemble, sample, predictions[-len(names) :])]
    return Preflight(
        teacher_top1=teacher_top1,
        clip_top1=clip_top1,
        fusion_top1=fusion_top1,
        networks=dict(zip(names, each, strict=True)),
        split=images.split,
        n=len(index),
        notes=tuple(notes),
    )


def _predictions(ensemble: TeacherEnsemble, output: EnsembleOutput) -> torch.Tensor:
    """int64 [3 + networks, B]: classes predicted by the teachers, the CLIPs, their fusion, and then each network."""
    import torch

    fused, _ = ensemble.fuse(*output)
    logits = [ensemble.teacher_logits(output.teachers), ensemble.clip_logits(output.clips), fused]
    logits += [teacher.logits for teacher in output.teachers] + ensemble.scaled_logits(output.clips)
    return torch.stack([each.argmax(1) for each in logits])
