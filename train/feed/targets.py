"""The targets of a cache, a whole view at a time, in memory on the training device."""

from __future__ import annotations

import torch

from cache_tools.codecs import SparseTargets
from cache_tools.format.manifest import Fusion
from cache_tools.reader import TeacherCache
from cache_tools.targets import ViewTargets
from train.feed.batch import BatchTargets


class CachedView:
    """One view of a cache, in memory on the training device."""

    def __init__(
        self,
        targets: ViewTargets,
        logits: bool,
        features: bool,
        components: bool = False,
        sparse_temperature: float | None = None,
    ) -> None:
        self._targets, self._logits, self._features, self._components = targets, logits, features, components
        self._sparse_temperature = sparse_temperature

    def batch(self, index: torch.Tensor, pixels_NCHW_u8: torch.Tensor) -> BatchTargets:
        targets = self._targets
        return BatchTargets(
            self._batch_logits(index) if self._logits else None,
            targets.features(index) if self._features else None,
            targets.component_features(index) if self._components else None,
        )

    def _batch_logits(self, index: torch.Tensor) -> torch.Tensor | SparseTargets:
        if self._sparse_temperature is None:
            return self._targets.logits(index)
        return self._targets.sparse_logits(index, self._sparse_temperature)


class CachedTargets:
    """The targets of a cache, read a whole view at a time, and only the arrays that the loss uses.

    Args:
        sparse_temperature: gives top-k targets as stored, for a loss at this temperature; None for dense logits.
    """

    def __init__(
        self,
        cache: TeacherCache,
        device: torch.device,
        *,
        logits: bool,
        features: bool,
        components: bool = False,
        fusion: Fusion | None = None,
        sparse_temperature: float | None = None,
    ) -> None:
        self._cache, self._device, self._logits, self._features = cache, device, logits, features
        self._components, self._fusion, self.sparse_temperature = components, fusion, sparse_temperature

    def view(self, view: int) -> CachedView:
        targets = self._cache.load_view(
            view, self._device, logits=self._logits, features=self._features, fusion=self._fusion
        )
        return CachedView(targets, self._logits, self._features, self._components, self.sparse_temperature)

    def close(self) -> None:
        pass
