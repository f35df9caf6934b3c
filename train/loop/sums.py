"""Running sums of the figures of an epoch, on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cache_tools.system.devices import float64_device
from cache_tools.system.joined import Joined
from train.feed import MixedLabels


class Sums:
    """Running sums of the loss terms and of right answers, on the device; read once per epoch.

    torchmetrics' MeanMetric would do the same in a metric per term, at several times the cost for every step.

    Attributes:
        count: number of samples.
    """

    def __init__(self) -> None:
        self.count = 0
        self._names: list[str] = []
        self._sums: Tensor | None = None  # float64; created by the first step, on its CUDA stream

    def clear(self) -> None:
        """Begin again, with the sums in the same memory."""
        self.count = 0
        if self._sums is not None:
            self._sums.zero_()

    def add(self, terms: dict[str, Tensor], logits: Tensor, labels: Tensor, mixed: MixedLabels | None = None) -> None:
        """Add the figures of a batch: batch means, each times the number of its samples."""
        figures = dict(terms)
        if labels.ndim == 1:  # of several labels none is the right one
            figures["train_top1"] = _share_of_right(logits.argmax(1), labels, mixed)
        values = torch.stack(list(figures.values())).detach()
        device = float64_device(values.device)
        if self._sums is None:
            self._sums = torch.zeros(len(values), dtype=torch.float64, device=device)
        elif self._sums.device != device:  # of a checkpoint
            self._sums = self._sums.to(device)
        # A float32 times a number of samples is exact in float64: one rounding for each addition.
        self._sums.add_(values.to(device), alpha=len(labels))
        self._names, self.count = list(figures), self.count + len(labels)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "names": self._names, "sums": None if self._sums is None else self._sums.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        sums = state["sums"]
        self.count, self._names, self._sums = state["count"], state["names"], None if sums is None else sums.double()

    def add_up(self, ranks: Joined) -> None:
        """Make the sums of rank 0 those of all ranks, and the others' nothing."""
        if self._sums is not None:
            total = ranks.add(torch.cat([self._sums, self._sums.new_full((1,), self.count)]))
            self.count = int(total[-1]) if ranks.rank.is_first else 0
            self._sums = total[:-1] if ranks.rank.is_first else torch.zeros_like(self._sums)

    def compute(self, ranks: Joined | None = None) -> dict[str, float]:
        """The means over all samples, also over those of all ranks. It waits for the device."""
        assert self._sums is not None, "an epoch has steps"
        sums, count = self._sums, self.count
        if ranks is not None:
            *values, count = ranks.add(torch.cat([sums, sums.new_full((1,), count)])).tolist()
            sums = sums.new_tensor(values)
        return dict(zip(self._names, (sums / count).tolist(), strict=True))


def _share_of_right(top1: Tensor, labels: Tensor, mixed: MixedLabels | None) -> Tensor:
    right = top1 == labels
    if mixed is None:
        return right.mean(dtype=torch.float32)
    return torch.lerp((top1 == mixed.partner).float(), right.float(), mixed.share).mean()
