"""Several students on one stream of batches: pixels, targets and augmentation are made once for all of them.

Every student's weights are bit for bit what a run of its own would give on the CPU: batches are the same, and whatever
draws from the global generators (dropout) finds them as in its own run. A student that fails drops out alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cache_tools.errors import CacheError
from cache_tools.format.recipe import Preprocessing
from cache_tools.memory import drop_tracebacks
from train.feed import Batch, Feed
from train.loop import Learner, explain_out_of_memory, model_inputs

Outcome = dict[str, float] | Exception
Turn = list[tuple[Batch, Tensor]]
# On a CPU a learner takes several steps in a row: its weights, gradients and momentum stay in the processor's cache.
TURN, TURN_BYTES = 8, 64 << 20


def train_epoch_together(
    learners: Sequence[Learner], feed: Feed, epoch: int, advance: Callable[[int], None]
) -> list[Outcome]:
    """One pass of all learners over the same batches.

    Args:
        learners: of one batch stream: same dataset, views, batch size, seed and preprocessing.
        advance: told how many images all have made their steps on since it was last told.

    Returns:
        For each learner the means of its epoch (`Learner.train_epoch`), or what stopped it: a loss that is not finite,
        memory that did not suffice, or any other error of its own. Errors of the feed are raised.
    """
    lanes = [_Lane(learner, epoch, alone=len(learners) == 1) for learner in learners]
    most = TURN if len(learners) > 1 and feed.device.type == "cpu" else 1
    for turn in _turns(feed, epoch, learners[0].preprocessing, most):
        for lane in lanes:
            lane.take(turn)
        advance(sum(len(batch.labels) for batch, _ in turn))
    return [lane.finish() for lane in lanes]


def _turns(feed: Feed, epoch: int, preprocessing: Preprocessing, most: int) -> Iterator[Turn]:
    """Batches with what students see of them, as many as a learner takes before it is another's turn."""
    turn: Turn = []
    for batch in feed.epoch(epoch):
        inputs = model_inputs(batch, preprocessing)
        turn.append((batch, inputs))
        if len(turn) == most or len(turn) * inputs.nbytes >= TURN_BYTES:
            yield turn
            turn = []
    if turn:
        yield turn


class _Lane:
    """One learner's way through an epoch: its random state, its CUDA stream, and what went wrong."""

    def __init__(self, learner: Learner, epoch: int, *, alone: bool) -> None:
        self._learner, self._epoch, self._alone = learner, epoch, alone
        self._error: Exception | None = None
        cuda = learner.device.type == "cuda"
        # On a stream each, the kernels of small students fill the gaps that the others leave.
        self._stream = torch.cuda.Stream(learner.device) if cuda and not alone else None
        learner.begin_epoch(epoch)
        self._random = None if alone else _random_state(learner.device)

    def take(self, turn: Turn) -> None:
        if self._error is not None:
            return
        device = self._learner.device
        try:
            with self._own_random(), self._own_stream(turn), explain_out_of_memory(self._learner.recipe, device):
                for batch, inputs in turn:
                    self._learner.step(batch, inputs)
        except Exception as error:
            self._fail(error)

    def finish(self) -> Outcome:
        if self._error is not None:
            return self._error
        if self._stream is not None:
            torch.cuda.current_stream(self._learner.device).wait_stream(self._stream)
        try:
            return self._learner.end_epoch(self._epoch)
        except CacheError as error:
            return error

    def _fail(self, error: Exception) -> None:
        """Keep the message and let go of the memory that others need: the traceback holds every tensor of the step."""
        self._error = error if self._alone else drop_tracebacks(error)
        self._learner.optimiser.zero_grad(set_to_none=True)
        if self._learner.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        if self._random is None:
            yield
            return
        _set_random_state(self._learner.device, self._random)
        yield
        self._random = _random_state(self._learner.device)

    @contextmanager
    def _own_stream(self, turn: Turn) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._learner.device))
        with torch.cuda.stream(self._stream):
            yield
        for tensor in _tensors(turn):  # made on the stream of the feed, used on this one
            tensor.record_stream(self._stream)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _tensors(turn: Turn) -> Iterator[Tensor]:
    for batch, inputs in turn:
        yield from (batch.pixels, batch.labels, batch.index, inputs)
        for value in (batch.labelled, *batch.targets):
            parts = value if isinstance(value, tuple) else (value,)
            yield from (part for part in parts if isinstance(part, Tensor))
