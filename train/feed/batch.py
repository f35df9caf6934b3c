"""A training batch, and the sources of its targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from cache_tools.codecs import SparseTargets


class BatchTargets(NamedTuple):
    """The targets of a batch, float32; None for those that the loss does not use.

    Attributes:
        logits: fused, [B, C], or sparse for a cache of top-k targets (see `CachedTargets.sparse_temperature`).
        features: fused, [B, D].
        components: the features of each network [B, ·], teachers before CLIPs.
    """

    logits: torch.Tensor | SparseTargets | None = None
    features: torch.Tensor | None = None
    components: tuple[torch.Tensor, ...] | None = None


class MixedLabels(NamedTuple):
    """The labels of a batch of mixed samples, besides their own: those of the partners.

    Attributes:
        partner: int64 [B].
        share: float32 [B], of the own label; the partner's has the rest.
    """

    partner: torch.Tensor
    share: torch.Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One training batch, everything on the training device."""

    pixels: torch.Tensor  # uint8 [B, 3, H, W], the view's pixels
    labels: torch.Tensor  # int64 [B]; for images with several labels 0 and 1, uint8 [B, C]
    index: torch.Tensor  # int64 [B], rows of the split
    targets: BatchTargets
    labelled: torch.Tensor | None = None  # bool [B], whether the label is real; None if all are
    start: int = 0  # place of the first sample in the epoch's order
    epoch_labels: torch.Tensor | None = None  # int64, the labels of all samples of the epoch, in its order
    mixed: MixedLabels | None = None  # of a view that mixes its samples


class ViewSource(Protocol):
    """The targets of one view."""

    def batch(self, index: torch.Tensor, pixels_NCHW_u8: torch.Tensor) -> BatchTargets:
        """The targets of samples `index` (int64 [B]); live teachers compute them from the pixels of the view."""


class TargetSource(Protocol):
    """A source of targets: a cache, live teachers, or none. `view` may be called from a background thread."""

    def view(self, view: int) -> ViewSource: ...

    def close(self) -> None: ...


class NoTargets:
    """The target source of training on labels alone."""

    def view(self, view: int) -> NoTargets:
        return self

    def batch(self, index: torch.Tensor, pixels_NCHW_u8: torch.Tensor) -> BatchTargets:
        return BatchTargets()

    def close(self) -> None:
        pass
