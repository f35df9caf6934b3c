"""The batches of every epoch: pixels, labels, sample indices and targets, from device memory or streamed.

Both feeds give the same batches in the same order, bit for bit: order and views are functions of (seed, epoch, sample),
never of timing. Epoch e shows view e modulo the number of cached views; without a cache every epoch shows a new view.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.codecs import SparseTargets
from cache_tools.decoding.service import load_canvases, service_for, start_loading
from cache_tools.errors import RecipeError
from cache_tools.format.manifest import Fusion
from cache_tools.images.image_set import ImageSet
from cache_tools.reader import TeacherCache
from cache_tools.targets import ViewTargets
from cache_tools.views.recipe import ViewRecipe
from train.labelled import PartialLabels

PIECE_BYTES = 32 << 20
STREAM_DEPTH = 4
RESIDENT_SHARE = 0.6


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


class Feed(ABC):
    """Batches of one split, epoch by epoch.

    The last batch of an epoch may be short. If it would hold a single sample it is left out, because batch statistics
    and relational losses need two. The order changes every epoch, so a different sample is left out each time.
    In a view that mixes its samples the two of a pair follow each other, so that they are in one batch, and the sample
    without a partner, if their number is odd, comes last.

    Args:
        num_views: views to cycle through; None shows view e in epoch e.
        epochs: of the run; no view is fetched for a later one.
        known: the labels, if only a fraction of them are real; None for the labels of `images`.
        samples: int64 [N], the numbers of the images in the cache, by which views are drawn and targets are found; None
            for 0 … N − 1.
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
    ) -> None:
        self.images, self.views, self.num_views, self.targets = images, views, num_views, targets
        self.epochs, self.seed, self.device = epochs, seed, device
        self.bounds = batch_bounds(len(images), batch_size)
        labels = images.labels if known is None else known.labels
        kind = np.int64 if labels.ndim == 1 else np.uint8
        self._labels = torch.from_numpy(np.ascontiguousarray(labels, dtype=kind)).to(device)
        self._labelled = None if known is None else torch.from_numpy(known.labelled).to(device)
        self._samples = samples
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="next-view")
        self._fetched: tuple[int, Future[ViewSource]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.bounds)

    @property
    def samples_per_epoch(self) -> int:
        return self.bounds[-1][1]

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `first` on; a background thread reads the targets of the next one."""
        view = self._view_of(epoch)
        order = self._order(epoch, view)
        source = self._fetch(view).result()
        if epoch + 1 < self.epochs:
            self._fetch(self._view_of(epoch + 1))
        index = order.to(self.device)
        samples = index if self._samples is None else torch.from_numpy(self._numbers(order.numpy())).to(self.device)
        labels = self._labels[index]
        epoch_labels = labels[: self.samples_per_epoch]
        labelled = None if self._labelled is None else self._labelled[index]
        mixed = self._mixed_labels(order.numpy(), view)
        bounds = self.bounds[first:]
        for (start, stop), pixels in zip(bounds, self._pixels(order.numpy(), view, bounds), strict=True):
            rows = index[start:stop]
            real = None if labelled is None else labelled[start:stop]
            targets = source.batch(samples[start:stop], pixels)
            both = None if mixed is None else MixedLabels(*(column[start:stop] for column in mixed))
            yield Batch(pixels, labels[start:stop], rows, targets, real, start, epoch_labels, both)

    def close(self) -> None:
        """Stop the background thread. The target source stays open: whoever opened it closes it."""
        self._fetcher.shutdown(wait=True, cancel_futures=True)

    @abstractmethod
    def _pixels(self, order: np.ndarray, view: int, bounds: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """The view's pixels for each of these batches of an epoch, uint8 on the device."""

    def _numbers(self, rows: np.ndarray) -> np.ndarray:
        """The numbers in the cache of rows of the split."""
        return rows if self._samples is None else self._samples[rows]

    def _order(self, epoch: int, view: int) -> torch.Tensor:
        if self.views.mixes(view):
            return pair_order(torch.from_numpy(self.views.pairs(view)), self.seed, epoch)
        return epoch_order(len(self.images), self.seed, epoch)

    def _mixed_labels(self, rows: np.ndarray, view: int) -> MixedLabels | None:
        mixing = self.views.mixing(rows, view, self.images.image_size)
        if mixing is None:
            return None
        partner = torch.from_numpy(mixing.partner).to(self.device)
        return MixedLabels(self._labels[partner], torch.from_numpy(mixing.share).float().to(self.device))

    def _view_of(self, epoch: int) -> int:
        return epoch if self.num_views is None else epoch % self.num_views

    def _fetch(self, view: int) -> Future[ViewSource]:
        if self._fetched is None or self._fetched[0] != view:
            self._fetched = view, self._fetcher.submit(self.targets.view, view)
        return self._fetched[1]


class ResidentFeed(Feed):
    """All pixels of the split on the device: an epoch's view is made at once, and a batch is a slice of it."""

    _resident: torch.Tensor | None = None

    def _pixels(self, order: np.ndarray, view: int, bounds: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        if self._resident is None:
            self._resident = self._load_all()
        size = self.views.output_size(self.images.image_size)
        pixels = torch.empty((len(order), 3, *size), dtype=torch.uint8, device=self.device)
        for piece in self._pieces():
            rows = order[piece]
            shown = self.views.with_partners(rows, view) if self.views.mixes(view) else rows
            chosen = self._resident.index_select(0, torch.from_numpy(shown).to(self.device))
            pixels[piece] = self.views.apply(chosen, self._numbers(rows), view)
        for start, stop in bounds:
            yield pixels[start:stop]

    def _load_all(self) -> torch.Tensor:
        if self.images.resident and self.device.type == "cpu":
            return torch.from_numpy(self.images.load(slice(None)))  # shares the source's memory and is never written
        resident = torch.empty((len(self.images), 3, *self.images.image_size), dtype=torch.uint8, device=self.device)
        load = load_canvases(self.images)
        for rows in self._pieces():
            resident[rows] = torch.from_numpy(load(rows)).to(self.device)
        return resident

    def _pieces(self) -> Iterator[slice]:
        """All rows, in pieces small enough to keep temporary tensors small."""
        height, width = self.images.image_size
        rows, count = max(PIECE_BYTES // (3 * height * width), 1), len(self.images)
        return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


class StreamingFeed(Feed):
    """For splits that do not fit in memory: a background thread loads, copies and transforms the next few batches.

    Long runs decode in processes (`cache_tools.decoding`), which work on all of these batches at once.

    The thread issues its CUDA work on the same stream as training. So a batch needs no synchronisation: kernels that
    training launches later run after the batch is ready.
    """

    def _pixels(self, order: np.ndarray, view: int, bounds: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        pending: deque[Future[torch.Tensor]] = deque()
        upcoming = iter(bounds)
        service = service_for(self.images, len(self.images) * self.epochs)
        with ThreadPoolExecutor(1, thread_name_prefix="pixels") as pool:
            try:
                for _ in bounds:
                    while len(pending) < STREAM_DEPTH and (bound := next(upcoming, None)) is not None:
                        rows = order[slice(*bound)]
                        numbers = self._numbers(rows)
                        on_gpu = self.device.type == "cuda"
                        load = start_loading(service, self.images, rows, numbers, [(self.views, view)], pin=on_gpu)
                        pending.append(pool.submit(self._finish, load, numbers, view))
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _finish(self, load: Callable[[], list[torch.Tensor]], numbers: np.ndarray, view: int) -> torch.Tensor:
        (pixels,) = load()
        if self.device.type == "cuda":
            pixels = pixels.to(self.device, non_blocking=True)
        return self.views.finish(pixels, numbers, view)


def open_feed(
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
) -> Feed:
    """A resident feed if the split and one view of it fit into 60 % of the free memory, else a streaming one.

    Views that crop the original pictures of files are streamed: pictures of several sizes are not kept.
    """
    size = views.output_size(images.image_size)
    needed = 3 * len(images) * (size[0] * size[1])
    if not (images.resident and device.type == "cpu"):  # else the feed uses the source's own memory
        needed += 3 * len(images) * images.image_size[0] * images.image_size[1]
    keeps_canvases = images.resident or views.box_op is None
    kind = ResidentFeed if keeps_canvases and needed <= RESIDENT_SHARE * free_memory(device) else StreamingFeed
    return kind(
        images,
        views,
        num_views,
        targets,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        device=device,
        known=known,
        samples=samples,
    )


def epoch_order(count: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of the samples in an epoch, int64 [count]: a function of (seed, epoch) alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch)))


def pair_order(pairs: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """The order of samples of which 2k and 2k + 1 are a pair, by a permutation of the pairs; an odd one stays last."""
    whole = len(pairs) // 2
    order = epoch_order(whole, seed, epoch)
    return torch.cat([pairs[: 2 * whole].view(whole, 2)[order].view(-1), pairs[2 * whole :]])


def mixed_seed(seed: int, *counters: int) -> int:
    """Mix a seed of any size and counters into 32 bits, all that torch's CPU generator uses of a seed."""
    return int(np.random.SeedSequence(seed, spawn_key=counters).generate_state(1)[0])


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


def free_memory(device: torch.device) -> int:
    """Free memory of a device, in bytes; on the CPU at most what the control group leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (text := (group / "memory.max").read_text().strip()) != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(
            stat["inactive_file"]
        )  # without the page cache, which shrinks on demand
        available = min(available, int(text) - used)
    return max(available, 0)
