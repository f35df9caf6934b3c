"""Targets from live teachers, batch by batch: the reference that caches are tested and measured against."""

from __future__ import annotations

import torch

from pipeline.networks.ensemble import TeacherEnsemble
from train.feed import BatchTargets


class LiveTeachers:
    """A target source for `train.loop` that runs teachers and CLIPs on every batch of view pixels.

    It has the interface of a cached source, `view(v).batch(index, pixels)`, and gives the rows of a float32 cache.
    """

    def __init__(self, ensemble: TeacherEnsemble) -> None:
        self._ensemble = ensemble

    def view(self, view: int) -> LiveTeachers:
        """The same object: live targets depend on the pixels alone."""
        return self

    def batch(self, index: torch.Tensor, pixels_NCHW_u8: torch.Tensor) -> BatchTargets:
        """Float32 targets of uint8 view pixels: fused logits [B, C], fused features [B, D], each network's features."""
        # In the order in memory that a build has: other kernels round otherwise.
        teachers, clips = self._ensemble.outputs(pixels_NCHW_u8.contiguous())
        logits, features = self._ensemble.fuse(teachers, clips)
        components = [teacher.features for teacher in teachers] + [clip.features for clip in clips]
        # Cloned out of inference mode: the loss uses them while it records gradients.
        return BatchTargets(logits.clone(), features.clone(), tuple(component.clone() for component in components))

    def close(self) -> None:
        """Nothing to release."""
