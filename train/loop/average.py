"""An exponential moving average of a student's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of all weights and buffers of a student, as timm's `ModelEmaV3` with warm-up computes it.

    After n updates it reaches back about n^(2/3) of them, so that short runs also get a useful average. The tensors are
    listed once: going through the state of a network at every update takes longer than the average itself.

    Args:
        student: on its device, with the memory format that it keeps.
        decay: the largest decay.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        self._decay = decay
        self._averaged = copy.deepcopy(student).eval().requires_grad_(False)
        pairs = list(zip(_tensors(self._averaged), _tensors(student), strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @property
    def module(self) -> nn.Module:
        """The network with the averaged weights; its counters of batches are those of the student."""
        self._copy_counters()
        return self._averaged

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Follow the student after an update.

        Args:
            number: of the update, from 1.
        """
        averages, weights = zip(*self._floats, strict=True)
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay_of(number))

    def decay_of(self, number: int) -> float:
        """The decay of an update, from 1: 1 − number^(−2/3), at most `decay`; 0 for the first one."""
        return max(0.0, min(1.0 - float(number) ** -(2.0 / 3.0), self._decay))

    @torch.no_grad()
    def _copy_counters(self) -> None:
        for average, counter in self._counters:
            average.copy_(counter)


def _tensors(network: nn.Module) -> list[Tensor]:
    return list(network.state_dict().values())
