"""A training batch, and the sources of its targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.codecs import SparseTargets


class BatchTargets(NamedTuple):
    """The targets of a batch, float32; None for those that the loss does not use.

    Attributes:
        logits: fused, [B, C], or sparse for a cache of sparse targets (see `CachedTargets.sparse_temperature`).
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
    sizes: tuple[int, ...] | None = None  # of several ranks: the samples of each; the tensors have those of one

    @property
    def samples(self) -> int:
        """The samples of the batch, over all ranks."""
        return len(self.labels) if self.sizes is None else sum(self.sizes)


class ViewSource(Protocol):
    """The targets of one view."""

    def batch(self, index: torch.Tensor, pixels_NCHW_u8: torch.Tensor) -> BatchTargets:
        """The targets of samples `index` (int64 [B]); live teachers compute them from the pixels of the view."""


class TargetSource(Protocol):
    """A source of targets: a cache, live teachers, or none. `view` may be called from a background thread."""

    def view(self, view: int) -> ViewSource: ...

    def close(self) -> None: ...


@runtime_checkable
class WindowSource(TargetSource, Protocol):
    """Targets that can be read in blocks, such as those of a cache.

    Attributes:
        num_samples: of the cache.
        block_rows: samples in a block.
        row_bytes: memory of the targets of a sample on the device.
    """

    @property
    def num_samples(self) -> int: ...

    @property
    def block_rows(self) -> int: ...

    @property
    def row_bytes(self) -> int: ...

    def window(self, view: int, blocks: Sequence[int]) -> ViewSource:
        """The targets of some blocks of a view, for samples of these blocks. May be called from a background thread."""

    def take(self, source: Any, index: torch.Tensor) -> Any:
        """The rows of samples `index` of a `window`, as they are stored."""

    def batch_of(self, parts: Sequence[Any]) -> BatchTargets:
        """The targets of rows that `take` has given, one part after the other."""


@runtime_checkable
class WaitingSource(Protocol):
    """Targets that may not be there yet: `view` and `window` wait for them."""

    def stop_waiting(self) -> None:
        """End `view` and `window` where they wait, with an error. May be called from any thread."""


@runtime_checkable
class PreparingSource(Protocol):
    """Targets that can be brought nearer before they are read."""

    def prepare(self, view: int) -> None:
        """A view is needed next. Returns at once."""


@runtime_checkable
class RowSource(Protocol):
    """Targets of which a rank can take the rows of its own samples alone."""

    def rows(self, view: int, samples: npt.NDArray[np.int64]) -> ViewSource:
        """The targets of some samples of a view. May be called from a background thread."""


class NoTargets:
    """The target source of training on labels alone."""

    def view(self, view: int) -> NoTargets:
        return self

    def batch(self, index: torch.Tensor, pixels_NCHW_u8: torch.Tensor) -> BatchTargets:
        return BatchTargets()

    def close(self) -> None:
        pass
