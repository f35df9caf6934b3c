"""The order of an epoch, and the windows of blocks in which its targets are read.

Without a window an epoch is one permutation of all samples, and the targets of its whole view are in memory. With a
window of n blocks the blocks of the cache are permuted, n of them at a time are a window, and the samples inside are
permuted. So only the targets of two windows are in memory: the one in use, and the next, which a background thread
reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.errors import OutOfMemoryError, RecipeError
from cache_tools.system.devices import in_current_stream
from cache_tools.system.memory import free_memory
from cache_tools.system.ranks import ALONE, Rank
from cache_tools.units import human_bytes
from train.feed.batch import BatchTargets, RowSource, TargetSource, ViewSource, WaitingSource, WindowSource

TARGETS_SHARE = 0.8
"""Of the free memory, for the targets in use and those that are read meanwhile."""
_MOST_WINDOW = 1 << 20


_Key = tuple[int, tuple[int, ...] | None, int | None]
"""Of a `Window`, without its place."""


class Window(NamedTuple):
    """A part of an epoch, by what has to be in memory for it.

    Attributes:
        stop: the place in the epoch's order where it ends.
        view: whose targets it needs.
        blocks: the blocks of the view that it needs; None for the whole view.
        epoch: of several ranks without a shuffle window: the epoch for whose samples it needs targets; None for all.
    """

    stop: int
    view: int
    blocks: tuple[int, ...] | None
    epoch: int | None = None


@dataclass(frozen=True, eq=False)
class Blocks:
    """Where the samples of a split lie in a cache, and how many blocks are read at a time.

    Attributes:
        block_of: int32 [N], the block of each sample.
        window: number of blocks.
    """

    block_of: npt.NDArray[np.int32]
    window: int

    @cached_property
    def _members(self) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.integer], npt.NDArray[np.int64]]:
        """The samples by block (None if that is their order), the blocks, and where each begins (last: the end)."""
        is_sorted = bool((self.block_of[1:] >= self.block_of[:-1]).all())
        members = None if is_sorted else np.argsort(self.block_of, kind="stable")
        present, starts = np.unique(self.block_of if members is None else self.block_of[members], return_index=True)
        return members, present, np.append(starts, len(self.block_of))

    def first(self, seed: int, epoch: int, view: int) -> Window:
        """The first window of an epoch."""
        return self._windows(seed, epoch, view)[0]

    def order(self, seed: int, epoch: int, view: int) -> tuple[torch.Tensor, list[Window]]:
        """The order of the samples in an epoch, int64 [N], and its windows: a function of (seed, epoch, window)."""
        members, present, starts = self._members
        windows = self._windows(seed, epoch, view)
        order = torch.empty(len(self.block_of), dtype=torch.int64)
        begin = 0
        for number, window in enumerate(windows):
            places = np.searchsorted(present, window.blocks or ())
            rows = np.concatenate([np.arange(starts[place], starts[place + 1]) for place in places])
            rows = rows if members is None else members[rows]
            order[begin : window.stop] = torch.from_numpy(rows)[permutation(len(rows), seed, epoch, 3, number)]
            begin = window.stop
        return order, windows

    def _windows(self, seed: int, epoch: int, view: int) -> list[Window]:
        _, present, starts = self._members
        blocks = permutation(len(present), seed, epoch, 2).numpy()
        stops = np.cumsum(np.diff(starts)[blocks])
        windows = []
        for first in range(0, len(blocks), self.window):
            last = min(first + self.window, len(blocks))
            windows.append(Window(int(stops[last - 1]), view, tuple(present[blocks[first:last]].tolist())))
        return windows


def blocks_of(targets: TargetSource, window: int, count: int, samples: npt.NDArray[np.int64] | None) -> Blocks:
    """Where the samples of a split lie.

    Args:
        window: blocks to read at a time.
        count: samples of the split.
        samples: their numbers in the cache; None for 0 … count − 1.

    Raises:
        RecipeError: targets that are not read in blocks.
    """
    if not isinstance(targets, WindowSource):
        raise RecipeError(
            "a shuffle window is a number of blocks of a cache, and these targets are not read from one",
            where=f"--shuffle-window {window}",
            next_step="leave it out",
        )
    numbers = np.arange(count) if samples is None else samples
    return Blocks((numbers // targets.block_rows).astype(np.int32), window)


class TargetReader:
    """Reads the targets of one window after the other.

    Args:
        targets: where they come from; `view` and `window` are called from a background thread.
        device: of the targets.
        own_samples: epoch → the numbers in the cache of the samples that this rank needs in it.
        ahead: read the next window while one is in use; else each is read when it is needed, and memory holds one.
    """

    def __init__(
        self,
        targets: TargetSource,
        device: torch.device,
        own_samples: Callable[[int], npt.NDArray[np.int64]],
        *,
        ahead: bool = True,
    ) -> None:
        self._targets, self._device, self._own_samples, self._ahead = targets, device, own_samples, ahead
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-view")
        self._held: dict[_Key, Future[ViewSource]] = {}

    def use(self, window: Window, following: Window | None) -> ViewSource:
        """The targets of a window. Gives up those of all but the following, and begins to read that."""
        wanted = [window[1:]]
        if self._ahead and following is not None:
            wanted.append(following[1:])
        self._held = {key: future for key, future in self._held.items() if key in wanted}
        source = self._begin(wanted[0]).result()
        for key in wanted[1:]:
            self._begin(key)
        return source

    def close(self) -> None:
        """Stop the background thread."""
        if isinstance(self._targets, WaitingSource):
            self._targets.stop_waiting()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._held = {}

    def _begin(self, key: _Key) -> Future[ViewSource]:
        if key not in self._held:
            view, blocks, epoch = key
            if blocks is None and epoch is not None and isinstance(self._targets, RowSource):
                read: Callable[[], ViewSource] = partial(self._read_own, self._targets, view, epoch)
            elif blocks is None:
                read = partial(self._targets.view, view)
            else:
                assert isinstance(self._targets, WindowSource), "only a source with blocks has windows"
                read = partial(self._targets.window, view, blocks)
            self._held[key] = self._pool.submit(in_current_stream(self._device, read))
        return self._held[key]

    def _read_own(self, targets: RowSource, view: int, epoch: int) -> ViewSource:
        return targets.rows(view, self._own_samples(epoch))


class EpochTargets:
    """The targets of the batches of an epoch, asked for in its order.

    Args:
        windows: of the epoch.
        following: the first window of the next epoch; None for none.
    """

    def __init__(
        self, reader: TargetReader, targets: TargetSource, windows: Sequence[Window], following: Window | None
    ) -> None:
        self._reader, self._targets = reader, targets
        self._windows, self._following = [*windows], following
        self._number = -1
        self._source: ViewSource | None = None

    def batch(self, start: int, stop: int, index: torch.Tensor, pixels: torch.Tensor) -> BatchTargets:
        """The targets of samples `index`, which are at `start` to `stop` of the epoch's order."""
        self._go_to(start)
        if stop <= self._windows[self._number].stop:
            assert self._source is not None
            return self._source.batch(index, pixels)
        assert isinstance(self._targets, WindowSource), "only a source with blocks has windows"
        parts, done = [], start
        while done < stop:  # a batch that begins in one window and ends in another
            self._go_to(done)
            end = min(stop, self._windows[self._number].stop)
            assert self._source is not None
            parts.append(self._targets.take(self._source, index[done - start : end - start]))
            done = end
        return self._targets.batch_of(parts)

    def _go_to(self, place: int) -> None:
        """Make the window that holds this place of the order the one in use."""
        number = self._number
        while number < 0 or place >= self._windows[number].stop:
            number += 1
        if number != self._number:
            self._source = None  # frees its memory before the next but one is read
            following = [*self._windows[number + 1 :], self._following][0]
            self._source = self._reader.use(self._windows[number], following)
            self._number = number


class TargetMemory(NamedTuple):
    """What the targets of a run take of the memory of its device.

    Attributes:
        num_bytes: of all that is in memory together.
        read_ahead: whether the targets that follow are read while others are in use.
    """

    num_bytes: int
    read_ahead: bool


def target_memory(
    targets: TargetSource,
    window: int | None,
    device: torch.device,
    *,
    views: int | None,
    epochs: int,
    rank: Rank = ALONE,
) -> TargetMemory:
    """What the targets take. Where two windows (two views without a window) do not fit, the next is not read ahead.

    Args:
        views, epochs: of the run.
        rank: of several that share the rows of a view, and on the CPU the memory of their machine.

    Raises:
        OutOfMemoryError: not even one fits; names a window that would.
    """
    if not isinstance(targets, WindowSource):
        return TargetMemory(0, read_ahead=True)
    block_bytes = targets.block_rows * targets.row_bytes
    wanted = targets.num_samples * targets.row_bytes
    if window is not None:
        wanted = min(wanted, window * block_bytes)
    elif isinstance(targets, RowSource):
        wanted = wanted // rank.count
    usable = int(TARGETS_SHARE * free_memory(device)) // (rank.local_count if device.type == "cpu" else 1)
    if wanted > usable:
        raise _too_large(window, wanted, usable, usable // (2 * block_bytes))
    if window is None and ((views == 1 and rank.is_alone) or epochs == 1):
        return TargetMemory(wanted, read_ahead=True)
    read_ahead = 2 * wanted <= usable
    return TargetMemory(2 * wanted if read_ahead else wanted, read_ahead)


def _too_large(window: int | None, wanted: int, usable: int, most: int) -> OutOfMemoryError:
    what = "a whole view does" if window is None else f"a window of {window:,} blocks does"
    fits = 1 << (max(1, min(most, _MOST_WINDOW)).bit_length() - 1)
    return OutOfMemoryError(
        f"the targets of {what} not fit into memory",
        where="cached targets" if window is None else f"--shuffle-window {window}",
        expected=f"at most {human_bytes(usable)}, {TARGETS_SHARE:.0%} of what is free",
        found=human_bytes(wanted),
        next_step=f"--shuffle-window {fits} (the order of the samples changes, and so the run), or more memory"
        if most
        else "train where there is more memory",
    )


def permutation(count: int, seed: int, *counters: int) -> torch.Tensor:
    """A permutation of 0 … count − 1, int64: a function of seed and counters alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed_seed(seed, *counters)))


def mixed_seed(seed: int, *counters: int) -> int:
    """Mix a seed of any size and counters into 32 bits, all that torch's CPU generator uses of a seed."""
    return int(np.random.SeedSequence(seed, spawn_key=counters).generate_state(1)[0])
