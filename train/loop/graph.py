"""An epoch whose updates read nothing but tensors, and on CUDA are captured as graphs.

The whole epoch is on the device: pixels, labels and decoded targets, in its order. An update finds its batch by a
counter, its learning rate and the decay of the average in a table, and adds its figures to sums, all on the device. So
nothing of it depends on the host, and it can be recorded once and replayed: one graph for whole updates, another for
the last one of an epoch, where it has fewer samples. The first updates of a run, WARM_UP of each kind, are made without
a graph.

Several students read the same buffers, which nobody writes while they train. Each has its own graphs, and replays them
on its own stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cache_tools.errors import RecipeError
from train.feed import Batch, Feed, ResidentFeed
from train.loop.learner import Learner, model_inputs
from train.optim import Update

WARM_UP = 3


class EpochBuffers:
    """The batches of an epoch in tensors that keep their place in memory, for any number of learners to read.

    Args:
        feed: with all pixels on the device.

    Attributes:
        rows: all samples of the epoch, in its order, as one batch.
    """

    rows: Batch

    def __init__(self, feed: Feed) -> None:
        if not isinstance(feed, ResidentFeed):
            raise RecipeError(
                "a captured step needs all pixels on the device",
                where="--compile step",
                found=type(feed).__name__,
                next_step="give more --device-memory, or train with --compile model or off",
            )
        self.feed, self._is_made = feed, False

    def fill(self, epoch: int) -> None:
        """Put an epoch where the last one was. The work is on the current stream."""
        for batch in self.feed.epoch(epoch):
            if not self._is_made:
                self.rows = _map(batch, partial(_room_for, self.feed.samples_per_epoch))
                self._is_made = True
            for buffer, rows in zip(_tensors(self.rows), _tensors(batch), strict=True):
                buffer[batch.start : batch.start + len(rows)].copy_(rows)


class TensorEpochs:
    """The epochs of one learner, in buffers that keep their place in memory.

    Args:
        capture: record the updates as graphs. Only on CUDA; elsewhere the same updates run as they are.
        beside_others: other learners read the same buffers, on streams of their own.
    """

    def __init__(self, learner: Learner, buffers: EpochBuffers, *, capture: bool, beside_others: bool = False) -> None:
        self.learner, self.buffers = learner, buffers
        self._capture, self._beside_others = capture, beside_others
        device, groups = learner.device, learner.optimiser.param_groups
        # The kernels of fused optimisers read float32; Python's numbers, which the CPU uses, are float64.
        precision = torch.float32 if device.type == "cuda" else torch.float64
        updates = -(-buffers.feed.steps_per_epoch // self._per_update)
        self._table = torch.zeros(updates, len(groups) + 1, dtype=precision, device=device)
        self._row = torch.zeros(1, len(groups) + 1, dtype=precision, device=device)
        self._number = torch.zeros(1, dtype=torch.int64, device=device)  # of the update within the epoch
        self._offsets = torch.arange(learner.recipe.batch_size * self._per_update, device=device)
        self._updates: dict[tuple[int, ...], Callable[[], None]] = {}

    def begin(self, done: int) -> None:
        """Prepare for the updates of the epoch in the buffers, from batch `done` on, the first of an update."""
        first = done // self._per_update
        assert done % self._per_update == 0, "the batches of an update belong together"
        self._set_rates(self.learner.updates - first)
        self._number.fill_(first)

    def update(self, done: int) -> int:
        """Make the update that begins with batch `done`. Returns the number of batches that are done then."""
        batches = self.buffers.feed.bounds[done : done + self._per_update]
        sizes = tuple(stop - start for start, stop in batches)
        if sizes not in self._updates:
            self._updates[sizes] = self._update_of(sizes)
        self._updates[sizes]()
        self.learner.updates += 1
        return done + len(sizes)

    @property
    def _per_update(self) -> int:
        return self.learner.recipe.optimiser.accumulate

    def _set_rates(self, first: int) -> None:
        """Write the learning rates and decays of an epoch, whose first update has this number in the run."""
        learner = self.learner
        rates = learner.rates(first, len(self._table))
        average = learner.average
        weights = [0.0 if average is None else 1.0 - average.decay_of(first + n + 1) for n in range(len(rates))]
        rows = [[*row, weight] for row, weight in zip(rates, weights, strict=True)]
        self._table.copy_(torch.tensor(rows, dtype=torch.float64))
        for number, group in enumerate(learner.optimiser.param_groups):
            group["lr"] = self._row[0, number]
            group["foreach"] = None  # on the CPU it takes no rate in a tensor; on CUDA the optimiser is fused

    def _update_of(self, sizes: tuple[int, ...]) -> Callable[[], None]:
        """The update of batches of these sizes; all that it reads and writes are tensors."""
        learner, samples = self.learner, sum(sizes)
        stops = [sum(sizes[: number + 1]) for number in range(len(sizes))]
        stride = learner.recipe.batch_size * self._per_update

        def make() -> None:
            epoch = self.buffers.rows
            torch.index_select(self._table, 0, self._number, out=self._row)
            rows = torch.add(self._offsets[:samples], self._number, alpha=stride)
            labels = epoch.labels.index_select(0, rows) if len(sizes) > 1 else None
            for number, (size, stop) in enumerate(zip(sizes, stops, strict=True)):
                batch = _map(epoch, partial(_rows, rows[stop - size : stop]))
                share = 1.0 if len(sizes) == 1 else size / samples
                update = Update(number == 0, number + 1 == len(sizes), share, labels)
                learner.train_on(batch, model_inputs(batch, learner.preprocessing), update)
            if learner.average is not None:
                learner.average.lerp(self._row[0, -1])
            self._number.add_(1)

        return _Captured(make, learner, beside_others=self._beside_others) if self._capture else make


class _Captured:
    """An update that is made WARM_UP times, then recorded as a graph, and from then on replayed.

    It runs on the current stream, but for warm-ups that cannot: those of the default stream cannot be recorded.
    """

    def __init__(self, update: Callable[[], None], learner: Learner, *, beside_others: bool) -> None:
        self._update, self._learner, self._beside_others = update, learner, beside_others
        self._made = self._samples = 0
        self._graph: Any = None

    def __call__(self) -> None:
        stream, current = self._learner.stream, torch.cuda.current_stream(self._learner.device)
        assert stream is not None, "graphs are for CUDA"
        if self._made < WARM_UP:  # also makes the state of the optimiser
            self._made += 1
            if current == stream:
                self._warm_up()
                return
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                self._warm_up()
            current.wait_stream(stream)
            return
        if self._graph is None:
            graph: Any = torch.cuda.CUDAGraph()
            count = self._learner.means.count
            # Other threads, such as the one that reads the next view, may go on meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._update()
            self._samples = self._learner.means.count - count
            self._learner.means.count = count
            self._graph = graph
        self._graph.replay()
        self._learner.means.count += self._samples

    def _warm_up(self) -> None:
        device = self._learner.device
        before = _drawn(device)
        self._update()
        if self._beside_others and _drawn(device) != before:
            # All graphs would read and advance the same counter of random numbers, in any order.
            raise RecipeError(
                "a student that draws random numbers, as for dropout, cannot be captured beside others",
                where=f"{self._learner.recipe.student}, --compile step",
                next_step="use --compile model or off, or train it alone",
            )


def _drawn(device: torch.device) -> bytes:
    """The state of the generator of a device, which the host keeps."""
    state: bytes = torch.cuda.get_rng_state(device).numpy().tobytes()
    return state


def _room_for(samples: int, rows: Tensor) -> Tensor:
    """A tensor for so many rows like these, images in the order in memory that convolutions want."""
    layout = torch.channels_last if rows.ndim == 4 else torch.contiguous_format
    return torch.empty((samples, *rows.shape[1:]), dtype=rows.dtype, device=rows.device, memory_format=layout)


def _rows(rows: Tensor, tensor: Tensor) -> Tensor:
    return tensor.index_select(0, rows)


def _map(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """A batch with a function of each tensor that has a row per sample."""

    def each(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        if isinstance(value, tuple):
            parts = [each(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    names = ("pixels", "labels", "index", "targets", "labelled", "mixed")
    changed = {name: each(getattr(batch, name)) for name in names}
    return dataclasses.replace(batch, **changed, start=0, epoch_labels=None)


def _tensors(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    _map(batch, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found
