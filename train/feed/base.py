"""The batches of every epoch, wherever their pixels come from; the subclasses of `Feed` say from where.

All feeds give the same batches in the same order, bit for bit: order and views are functions of (seed, epoch, sample),
never of timing. Epoch e shows view e modulo the number of cached views; without a cache every epoch shows a new view.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.errors import RecipeError
from cache_tools.images.image_set import ImageSet
from cache_tools.system.devices import copy_to
from cache_tools.system.ranks import ALONE, Rank
from cache_tools.views.recipe import Drawn, ViewRecipe
from train.feed.batch import Batch, MixedLabels, PreparingSource, TargetSource
from train.feed.windows import EpochTargets, TargetReader, Window, blocks_of, permutation
from train.labelled import PartialLabels


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """What the host computes of an epoch before its first batch. On CUDA the tensors are in pinned memory.

    Attributes:
        index: int64 [N], the rows of the split in the order of the epoch.
        samples: their numbers in the cache; None if they are the rows.
        mixed: of a view that mixes: the partner of each, and the share of its own label.
        own: (start, stop) in the order of each batch or, of several ranks, of this one's part of it.
        rows: the rows of these parts, one after the other; `bounds` are their places among them.
        drawn: the draws of the views, as the feed uses them.
    """

    view: int
    windows: list[Window]
    index: torch.Tensor
    samples: torch.Tensor | None
    mixed: tuple[torch.Tensor, torch.Tensor] | None
    own: Sequence[tuple[int, int]]
    rows: np.ndarray
    bounds: Sequence[tuple[int, int]]
    drawn: Sequence[Drawn]


class Feed(ABC):
    """Batches of one split, epoch by epoch.

    The last batch of an epoch may be short. If it would hold a single sample it is left out, because batch statistics
    and relational losses need two. The order changes every epoch, so a different sample is left out each time.
    In a view that mixes its samples the two of a pair follow each other, so that they are in one batch, and the sample
    without a partner, if their number is odd, comes last.

    Attributes:
        served: one line for users on where the pixels are; None if nobody chose that.

    Args:
        num_views: views to cycle through; None shows view e in epoch e.
        epochs: of the run; no view is fetched for a later one.
        known: the labels, if only a fraction of them are real; None for the labels of `images`.
        samples: int64 [N], the numbers of the images in the cache, by which views are drawn and targets are found; None
            for 0 … N − 1.
        window: number of blocks of the cache whose targets are in memory together (see `train.feed.windows`); None for
            whole views.
        read_ahead: read the targets that follow while others are in use.
        rank: of several that train together. All have the same batches, and each the pixels, labels and targets of its
            part of every batch.
    """

    def __init__(
        self,
        images: ImageSet,
        views: ViewRecipe,
        num_views: int | None,
        targets: TargetSource,
        *,
        batch_size: int,
        epochs: int,
        seed: int,
        device: torch.device,
        known: PartialLabels | None = None,
        samples: npt.NDArray[np.int64] | None = None,
        window: int | None = None,
        read_ahead: bool = True,
        rank: Rank = ALONE,
    ) -> None:
        self.rank = rank
        self.images, self.views, self.num_views, self.targets = images, views, num_views, targets
        self.epochs, self.seed, self.device = epochs, seed, device
        self.bounds = batch_bounds(len(images), batch_size)
        labels = images.labels if known is None else known.labels
        kind = np.int64 if labels.ndim == 1 else np.uint8
        self._labels = torch.from_numpy(np.ascontiguousarray(labels, dtype=kind)).to(device)
        self._labelled = None if known is None else torch.from_numpy(known.labelled).to(device)
        self._samples = samples
        self._blocks = None if window is None else blocks_of(targets, window, len(images), samples)
        self._reader = TargetReader(targets, device, self._own_samples, ahead=read_ahead)
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="next-epoch")
        self._plans: dict[int, Future[EpochPlan]] = {}
        self.served: str | None = None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.bounds)

    @property
    def has_windows(self) -> bool:
        """Whether the targets in memory change within an epoch."""
        return self._blocks is not None

    @property
    def samples_per_epoch(self) -> int:
        return self.bounds[-1][1]

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `first` on.

        Background threads read the targets that follow, and draw the order and the views of the next epoch.
        """
        plan = self._plans.pop(epoch).result() if epoch in self._plans and not first else self._plan(epoch, first)
        self._plans = {}
        following = None
        if epoch + 1 < self.epochs:
            following = self._first_window(epoch + 1)
            self._plans[epoch + 1] = self._planner.submit(self._plan, epoch + 1)
        source = EpochTargets(self._reader, self.targets, plan.windows, following)
        index = copy_to(plan.index, self.device)
        samples = index if plan.samples is None else copy_to(plan.samples, self.device)
        labels = self._labels[index]
        epoch_labels = labels[: self.samples_per_epoch]
        labelled = None if self._labelled is None else self._labelled[index]
        mixed = None
        if plan.mixed is not None:
            partner, share = (copy_to(column, self.device) for column in plan.mixed)
            mixed = MixedLabels(self._labels[partner], share)
        rank, own = self.rank, plan.own
        own_index = index if rank.is_alone or not own else torch.cat([index[start:stop] for start, stop in own])
        all_pixels = self._pixels(plan, own_index)
        for bound, (start, stop), pixels in zip(self.bounds[first:], own, all_pixels, strict=True):
            rows = index[start:stop]
            real = None if labelled is None else labelled[start:stop]
            targets = source.batch(start, stop, samples[start:stop], pixels)
            both = None if mixed is None else MixedLabels(*(column[start:stop] for column in mixed))
            sizes = None if rank.is_alone else rank.sizes(bound[1] - bound[0])
            if following is not None and isinstance(self.targets, PreparingSource):
                self.targets.prepare(following.view)
                following = None
            yield Batch(pixels, labels[start:stop], rows, targets, real, bound[0], epoch_labels, both, sizes)

    def close(self) -> None:
        """Stop the background threads. The target source stays open: whoever opened it closes it."""
        self._planner.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    def _plan(self, epoch: int, first: int = 0) -> EpochPlan:
        """All that the host computes for an epoch, from batch `first` on."""
        view = self._view_of(epoch)
        ordered, windows = self._order(epoch, view)
        order = ordered.numpy()
        own = [self.rank.part(*bound) for bound in self.bounds[first:]]
        rows, bounds = order, own
        if own and not self.rank.is_alone:
            stops = np.cumsum([stop - start for start, stop in own]).tolist()
            rows = np.concatenate([order[start:stop] for start, stop in own])
            bounds = list(zip([0, *stops[:-1]], stops, strict=True))
        return EpochPlan(
            view=view,
            windows=windows,
            index=self._for_copy(ordered),
            samples=None if self._samples is None else self._for_copy(torch.from_numpy(self._numbers(order))),
            mixed=self._mixed_labels(order, view),
            own=own,
            rows=rows,
            bounds=bounds,
            drawn=self._drawn(rows, view),
        )

    def _for_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in memory from which it is copied to the device while the host goes on."""
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _own_samples(self, epoch: int) -> np.ndarray:
        """The numbers in the cache of all samples that this rank trains on in an epoch."""
        order = self._order(epoch, self._view_of(epoch))[0].numpy()
        return self._numbers(np.concatenate([order[slice(*self.rank.part(*bound))] for bound in self.bounds]))

    def _drawn(self, rows: np.ndarray, view: int) -> Sequence[Drawn]:
        """What a feed draws for the views of these rows before an epoch; by default nothing."""
        return ()

    @abstractmethod
    def _pixels(self, plan: EpochPlan, index: torch.Tensor) -> Iterator[torch.Tensor]:
        """The view's pixels for each of the plan's `bounds`, uint8 on the device.

        Args:
            index: the plan's `rows`, on the device.
        """

    def _numbers(self, rows: np.ndarray) -> np.ndarray:
        """The numbers in the cache of rows of the split."""
        return rows if self._samples is None else self._samples[rows]

    def _order(self, epoch: int, view: int) -> tuple[torch.Tensor, list[Window]]:
        """The order of the samples in an epoch, and its windows."""
        whole = [self._whole(epoch, view)]
        if self.views.mixes(view):
            if self._blocks is not None:
                raise RecipeError(
                    "a shuffle window would separate the two images that a view mixes (views.mix)",
                    where=f"--shuffle-window {self._blocks.window}",
                    next_step="leave it out",
                )
            return pair_order(torch.from_numpy(self.views.pairs(view)), self.seed, epoch), whole
        if self._blocks is not None:
            return self._blocks.order(self.seed, epoch, view)
        return epoch_order(len(self.images), self.seed, epoch), whole

    def _first_window(self, epoch: int) -> Window:
        view = self._view_of(epoch)
        return self._whole(epoch, view) if self._blocks is None else self._blocks.first(self.seed, epoch, view)

    def _whole(self, epoch: int, view: int) -> Window:
        """A whole view, or of several ranks the rows that this one needs in the epoch."""
        return Window(len(self.images), view, None, None if self.rank.is_alone else epoch)

    def _mixed_labels(self, rows: np.ndarray, view: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The partner of each row, and the share of its own label."""
        mixing = self.views.mixing(rows, view, self.images.image_size)
        if mixing is None:
            return None
        partner, share = torch.from_numpy(mixing.partner), torch.from_numpy(mixing.share).float()
        return self._for_copy(partner), self._for_copy(share)

    def _view_of(self, epoch: int) -> int:
        return epoch if self.num_views is None else epoch % self.num_views


def epoch_order(count: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of the samples in an epoch, int64 [count]: a function of (seed, epoch) alone."""
    return permutation(count, seed, epoch)


def pair_order(pairs: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """The order of samples of which 2k and 2k + 1 are a pair, by a permutation of the pairs; an odd one stays last."""
    whole = len(pairs) // 2
    order = epoch_order(whole, seed, epoch)
    return torch.cat([pairs[: 2 * whole].view(whole, 2)[order].view(-1), pairs[2 * whole :]])


def batch_bounds(count: int, batch_size: int) -> list[tuple[int, int]]:
    """(start, stop) of each batch of an epoch, without a last batch of one sample.

    Raises:
        RecipeError: a single sample, too few for a batch.
    """
    bounds = [(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    if batch_size > 1 and bounds[-1][1] - bounds[-1][0] == 1:
        bounds.pop()
    if not bounds:
        raise RecipeError("cannot train on a single sample", expected="at least two images in the split")
    return bounds
