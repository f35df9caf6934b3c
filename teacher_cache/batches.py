"""Which samples are in which batch of an epoch: a batch sampler with the order of `train-student`."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Protocol

import torch
from torch.utils.data import Sampler

from teacher_cache.packages import claim

claim("train")

from cache_tools.errors import RecipeError  # noqa: E402
from cache_tools.reader import TeacherCache  # noqa: E402
from train.feed import batch_bounds, epoch_order, pair_order  # noqa: E402


class EpochData(Protocol):
    """What the sampler needs of a `CachedDataset`."""

    cache: TeacherCache

    @property
    def view(self) -> int: ...
    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int) -> None: ...
    def start_epoch(self) -> int: ...


class EpochBatches(Sampler[list[int]]):
    """A batch sampler: the batches of an epoch of `train-student`, a function of (seed, epoch, batch size) alone.

    The last batch may be short; a single sample left over is left out. In views that mix images the two of a pair are
    in one batch.

    Args:
        batch_size: over all ranks together.
    """

    def __init__(self, data: EpochData, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        numbers = {"batch_size": batch_size, "rank": rank, "world_size": world_size, "seed": seed}
        batch_size, rank, world_size, seed = (
            whole_number(number, f"CachedDataset.loader({name}=…)") for name, number in numbers.items()
        )
        if world_size < 1 or seed < 0:
            raise RecipeError(
                "a number is too small",
                where="CachedDataset.loader",
                expected="world_size at least 1, seed at least 0",
                found=f"world_size={world_size}, seed={seed}",
            )
        if batch_size < 1 or batch_size % world_size:
            raise RecipeError(
                "the batch size does not divide among the ranks",
                where="CachedDataset.loader",
                expected=f"a positive multiple of {world_size}",
                found=batch_size,
            )
        if not 0 <= rank < world_size:
            raise RecipeError(
                "no such rank", where="CachedDataset.loader", expected=f"0 to {world_size - 1}", found=rank
            )
        self._data, self._seed, self._rank, self._world_size = data, seed, rank, world_size
        bounds = batch_bounds(len(data), batch_size)
        self._bounds = [(start, stop) for start, stop in bounds if stop - start >= world_size]

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass this epoch, and show its view."""
        self._data.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._bounds)

    def __iter__(self) -> Iterator[list[int]]:
        # Lazily: a loader with workers asks for an iterator twice and uses one.
        epoch = self._data.start_epoch()
        order = self._order(epoch, self._data.view)
        for start, stop in self._bounds:
            yield order[start:stop].tensor_split(self._world_size)[self._rank].tolist()

    def _order(self, epoch: int, view: int) -> torch.Tensor:
        views = self._data.cache.recipe.views
        if views.mixes(view):
            return pair_order(torch.from_numpy(views.pairs(view)), self._seed, epoch)
        return epoch_order(len(self._data), self._seed, epoch)


def whole_number(value: object, where: str) -> int:
    """An argument as int; RecipeError if it is anything else than a whole number."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise RecipeError("not a whole number", where=where, expected="a whole number", found=repr(value))
    return operator.index(value)
