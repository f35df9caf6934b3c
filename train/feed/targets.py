"""The targets of a cache, in memory on the training device: a whole view at a time, or a window of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.codecs import SparseTargets
from cache_tools.format.manifest import Fusion
from cache_tools.reader import TeacherCache
from cache_tools.targets import ViewTargets, joined
from train.feed.batch import BatchTargets
from train.feed.following import Follower

READ_BYTES = 256 << 20  # of the blocks that are read at once where a rank keeps a part of their rows


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
        self.targets, self._logits, self._features, self._components = targets, logits, features, components
        self._sparse_temperature = sparse_temperature

    def batch(self, index: torch.Tensor, pixels_NCHW_u8: torch.Tensor) -> BatchTargets:
        targets = self.targets
        return BatchTargets(
            self._batch_logits(index) if self._logits else None,
            targets.features(index) if self._features else None,
            targets.component_features(index) if self._components else None,
        )

    def _batch_logits(self, index: torch.Tensor) -> torch.Tensor | SparseTargets:
        if self._sparse_temperature is None:
            return self.targets.logits(index)
        return self.targets.sparse_logits(index, self._sparse_temperature)


class CachedWindow:
    """Some blocks of one view of a cache, in memory on the training device.

    Args:
        view: has the rows of these blocks alone, one block after the other.
        firsts: int64 [blocks of the cache], on the device: the row of `view` where each of them begins.
    """

    def __init__(self, view: CachedView, firsts: torch.Tensor, block_rows: int) -> None:
        self._view, self._firsts, self._block_rows = view, firsts, block_rows

    def batch(self, index: torch.Tensor, pixels_NCHW_u8: torch.Tensor) -> BatchTargets:
        return self._view.batch(self._rows(index), pixels_NCHW_u8)

    def take(self, index: torch.Tensor) -> ViewTargets:
        """The targets of samples `index`, as stored."""
        return self._view.targets.at(self._rows(index))

    def _rows(self, index: torch.Tensor) -> torch.Tensor:
        return self._firsts[index // self._block_rows] + index % self._block_rows


class CachedRows:
    """Some samples of one view of a cache, in memory on the training device.

    Args:
        view: has the rows of these samples alone, in their order.
        samples: int64, ascending, on the device.
    """

    def __init__(self, view: CachedView, samples: torch.Tensor) -> None:
        self.view, self._samples = view, samples

    def batch(self, index: torch.Tensor, pixels_NCHW_u8: torch.Tensor) -> BatchTargets:
        return self.view.batch(torch.searchsorted(self._samples, index), pixels_NCHW_u8)


class CachedTargets:
    """The targets of a cache, and only the arrays that the loss uses.

    Args:
        sparse_temperature: gives sparse targets as stored, for a loss at this temperature; None for dense logits.
        follower: waits for views that are not built yet; None if all are.

    `close` closes the cache.
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
        follower: Follower | None = None,
    ) -> None:
        self._follower = follower
        if cache.stage is not None:
            cache.stage.resume()  # after another feed on the same cache
        self._cache, self._device, self._logits, self._features = cache, device, logits, features
        self._components, self._fusion, self.sparse_temperature = components, fusion, sparse_temperature

    @property
    def num_samples(self) -> int:
        return self._cache.num_samples

    @property
    def block_rows(self) -> int:
        return self._cache.manifest.block_rows

    @property
    def row_bytes(self) -> int:
        """Memory of the targets of a sample: the arrays as stored and, for a component cache, the fused targets."""
        wanted, recipe = {"fused_logits": self._logits, "fused_features": self._features}, self._cache.recipe
        specs = [spec for name, spec in self._cache.targets.items() if wanted.get(name, True)]
        stored = sum(array.stored.row_bytes for spec in specs for array in spec.arrays)
        if recipe.store != "components":
            return stored
        fused = self._logits * len(recipe.dataset.class_names) + self._features * recipe.fusion.feature_dim
        return stored + torch.float32.itemsize * fused

    def view(self, view: int) -> CachedView:
        return self._load(view, None)

    def window(self, view: int, blocks: Sequence[int]) -> CachedWindow:
        part, firsts = self._window(view, blocks)
        return CachedWindow(part, firsts.to(self._device), self.block_rows)

    def rows(self, view: int, samples: npt.NDArray[np.int64]) -> CachedRows:
        """Every block of the view is read, a few at a time, and only the rows of these samples are kept."""
        size, ascending = self.block_rows, np.sort(samples)
        at_once = max(READ_BYTES // (size * self.row_bytes), 1)
        blocks = np.unique(ascending // size)
        kept: dict[str, torch.Tensor] = {}
        done = 0
        for first in range(0, len(blocks), at_once):
            chosen = blocks[first : first + at_once].tolist()
            part, firsts = self._window(view, chosen)
            stop = int(np.searchsorted(ascending, (chosen[-1] + 1) * size))
            rows = torch.from_numpy(ascending[done:stop])
            taken = part.targets.at((firsts[rows // size] + rows % size).to(self._device))
            for name, values in taken.arrays.items():
                if name not in kept:
                    kept[name] = values.new_empty((len(ascending), *values.shape[1:]))
                kept[name][done:stop] = values
            done = stop
        whole = replace(taken, arrays=kept)
        return CachedRows(self._with_choices(whole), torch.from_numpy(ascending).to(self._device))

    def take(self, source: CachedWindow, index: torch.Tensor) -> ViewTargets:
        return source.take(index)

    def batch_of(self, parts: Sequence[ViewTargets]) -> BatchTargets:
        # Decoded together: a kernel may sum a row in another order in a batch of another size.
        targets = joined(parts)
        everything = torch.arange(len(targets), device=targets.device)
        return self._with_choices(targets).batch(everything, torch.empty(0))

    def prepare(self, view: int) -> None:
        self._cache.prepare_view(view)

    def stop_waiting(self) -> None:
        self._cache.stop_waiting()
        if self._follower is not None:
            self._follower.stop()

    def _window(self, view: int, blocks: Sequence[int]) -> tuple[CachedView, torch.Tensor]:
        """Some blocks, one after the other, and by the number of a block the row where it begins."""
        manifest = self._cache.manifest
        firsts = np.zeros(manifest.num_blocks, np.int64)
        sizes = [place.stop - place.start for place in map(manifest.block, blocks)]
        firsts[list(blocks)] = np.cumsum([0, *sizes[:-1]])
        return self._load(view, blocks), torch.from_numpy(firsts)

    def _load(self, view: int, blocks: Sequence[int] | None) -> CachedView:
        if self._follower is not None:
            self._follower.wait(view, blocks)
        targets = self._cache.load_view(
            view, self._device, logits=self._logits, features=self._features, fusion=self._fusion, blocks=blocks
        )
        return self._with_choices(targets)

    def _with_choices(self, targets: ViewTargets) -> CachedView:
        return CachedView(targets, self._logits, self._features, self._components, self.sparse_temperature)

    def close(self) -> None:
        self._cache.close()
