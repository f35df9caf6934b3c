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
        self._averages, self._weights = map(
            list, zip(*[pair for pair in pairs if pair[0].is_floating_point()], strict=True)
        )
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
        torch._foreach_lerp_(self._averages, self._weights, 1.0 - self.decay_of(number))

    @torch.no_grad()
    def lerp(self, weight: Tensor) -> None:
        """Follow the student after an update, by a weight (1 − decay) that is in a tensor on the device.

        On the CPU it gives the bits of `update`. On CUDA it has a rounding more than `update`, and three kernels.
        """
        if weight.is_cuda:
            difference = torch._foreach_sub(self._weights, self._averages)
            torch._foreach_mul_(difference, weight)
            torch._foreach_add_(self._averages, difference)
        else:
            weights = [weight.to(average.dtype) for average in self._averages]
            torch._foreach_lerp_(self._averages, self._weights, weights)

    def decay_of(self, number: int) -> float:
        """The decay of an update, from 1: 1 − number^(−2/3), at most `decay`; 0 for the first one."""
        return max(0.0, min(1.0 - float(number) ** -(2.0 / 3.0), self._decay))

    @torch.no_grad()
    def _copy_counters(self) -> None:
        for average, counter in self._counters:
            average.copy_(counter)


def _tensors(network: nn.Module) -> list[Tensor]:
    return list(network.state_dict().values())
