"""Targets from live teachers, batch by batch: what a cache replaces, kept to check it against and to measure it by."""

from __future__ import annotations

import torch

from pipeline.networks.ensemble import TeacherEnsemble
from train.feed import BatchTargets


class LiveTeachers:
    """A target source for `train.loop` that runs teachers and CLIPs on every batch of view pixels.

    Interface of a cached source: `view(v).batch(index, pixels)`. Rows equal a float32 cache of the same recipe.
    """

    def __init__(self, ensemble: TeacherEnsemble) -> None:
        self._ensemble = ensemble

    def view(self, view: int) -> LiveTeachers:
        """The same object: live targets depend on the pixels alone."""
        return self

    def batch(self, index: torch.Tensor, pixels_NCHW_u8: torch.Tensor) -> BatchTargets:
        """Fused logits [B, C] and features [B, D], and each network's own features, float32, of uint8 view pixels."""
        teachers, clips = self._ensemble.outputs(pixels_NCHW_u8)
        logits, features = self._ensemble.fuse(teachers, clips)
        own = [teacher.features for teacher in teachers] + [clip.features for clip in clips]
        # Cloned out of inference mode: the loss records gradients with them.
        return BatchTargets(logits.clone(), features.clone(), tuple(each.clone() for each in own))

    def close(self) -> None:
        """Nothing to release."""
