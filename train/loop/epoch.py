"""An epoch of one or several students.

Students that train together share the batches: pixels, targets and augmentation are made once. On a CPU each ends with
the same weights as if trained alone, bit for bit: it gets the same batches and has its own random state for dropout. A
student that fails does not stop the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from cache_tools.errors import DivergedError
from cache_tools.format.recipe import Preprocessing
from cache_tools.system.memory import drop_tracebacks
from train.feed import Batch, Feed
from train.loop.graph import TensorEpochs
from train.loop.learner import Learner, model_inputs
from train.loop.repeat import explain_failure, random_state, set_random_state

EpochOutcome = dict[str, float] | Exception
EpochState = dict[str, Any]
"""All that a learner needs to continue inside an epoch: plain values and tensors."""
Save = Callable[[Callable[[], list[EpochState | None]]], None]
"""Called between two turns with a function that makes the state of each learner, None for one that has stopped."""
Turn = list[tuple[Batch, Tensor]]
"""The batches that one student trains on in a row, each with its `model_inputs`."""

# On a CPU a student takes several steps in a row: its weights, gradients and momentum stay in the processor's cache.
BATCHES_PER_TURN, BYTES_PER_TURN = 8, 64 << 20


def train_epoch(
    learners: Sequence[Learner],
    feed: Feed,
    epoch: int,
    advance: Callable[[int], None],
    *,
    begun: Sequence[EpochState | None] = (),
    save: Save | None = None,
) -> list[EpochOutcome]:
    """Train every learner on all batches of an epoch.

    Args:
        learners: of the same dataset, views, batch size, seed and preprocessing.
        advance: called with the number of images that all learners have just trained on.
        begun: for each learner the state of this epoch to continue from, already loaded into the learner itself
            (its `learner`); None from the start. Learners that are ahead wait for the others.
        save: stores states, when it is time; None for never.

    Returns:
        For each learner the means over the samples (`loss`, its terms, `train_top1` in training mode), or the error
        that stopped it: a DivergedError, an OutOfMemoryError, or any other. Errors of the feed are raised.
    """
    alone = len(learners) == 1
    states = begun or [None] * len(learners)
    participants = [
        _Participant(learner, epoch, state, alone=alone) for learner, state in zip(learners, states, strict=True)
    ]
    batches = BATCHES_PER_TURN if not alone and feed.device.type == "cpu" else 1
    done = min(participant.done for participant in participants)
    if learners[0].recipe.compile == "step":
        assert alone, "a captured step has batches of its own"
        (participant,) = participants
        participant.train_captured(feed, epoch, advance, save)
        return [participant.outcome(epoch)]
    for turn in _turns(feed.epoch(epoch, done), learners[0].preprocessing, batches):
        for participant in participants:
            participant.train(turn[max(participant.done - done, 0) :])
        advance(sum(batch.samples for batch, _ in turn))
        done += len(turn)
        if all(participant.has_failed for participant in participants):
            break
        if save is not None and done < feed.steps_per_epoch and _may_save(learners):
            save(lambda: [participant.state() for participant in participants])
    return [participant.outcome(epoch) for participant in participants]


class _Participant:
    """A learner during an epoch, kept apart from the others: its random state, its CUDA stream, its error.

    Attributes:
        done: number of batches that it has trained on in this epoch.
    """

    def __init__(self, learner: Learner, epoch: int, begun: EpochState | None, *, alone: bool) -> None:
        self._learner, self._device, self._alone = learner, learner.device, alone
        self._error: Exception | None = None
        # With a stream each, the kernels of small students fill the gaps that the others leave.
        self._stream = None if alone else learner.stream
        self.done = 0
        learner.begin_epoch(epoch)
        if begun is not None:
            self.done = begun["batches"]
            learner.means.load_state_dict(begun["means"])
            if begun["random"] is not None:
                set_random_state(self._device, begun["random"])
        self._random_state = None if alone else random_state(self._device)

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def train(self, turn: Turn) -> None:
        """Make a step on each batch of a turn, unless an earlier one failed."""
        if self._error is not None or not turn:
            return
        explained = explain_failure(self._learner.recipe, self._device)
        try:
            with self._own_random_state(), self._own_stream(turn), explained:
                for batch, inputs in turn:
                    self._learner.step(batch, inputs)
            self.done += len(turn)
        except Exception as error:
            self._fail(error)

    def train_captured(self, feed: Feed, epoch: int, advance: Callable[[int], None], save: Save | None) -> None:
        """Make the rest of an epoch's updates as CUDA graphs; an update that has begun is finished without one."""
        learner = self._learner

        def after(done: int) -> None:
            self.done = done
            if save is not None and done < feed.steps_per_epoch:
                save(lambda: [self.state()])

        begun = -self.done % learner.recipe.optimiser.accumulate
        for turn in _turns(islice(feed.epoch(epoch, self.done), begun), learner.preprocessing, 1):
            self.train(turn)
            advance(sum(len(batch.labels) for batch, _ in turn))
        if self._error is not None:
            return
        try:
            with explain_failure(learner.recipe, self._device):
                learner.captured = learner.captured or TensorEpochs(learner, feed, capture=self._device.type == "cuda")
                learner.captured.train(epoch, self.done, advance, after)
        except Exception as error:
            self._fail(error)

    def state(self) -> EpochState | None:
        """The state after the last turn; None after an error."""
        if self._error is not None:
            return None
        self._join()
        self._learner.meet()
        return {
            "learner": self._learner.state_dict(),
            "batches": self.done,
            "means": self._learner.means.state_dict(),
            "random": self._random_state or random_state(self._device),
            **_random_of_ranks(self._learner),
        }

    def outcome(self, epoch: int) -> EpochOutcome:
        """The means of the epoch, or the error that stopped the learner."""
        if self._error is not None:
            return self._error
        self._join()
        try:
            return self._learner.end_epoch(epoch)
        except DivergedError as error:
            return error

    def _join(self) -> None:
        """Let the current stream wait for the learner's own."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _fail(self, error: Exception) -> None:
        """Keep the error, and free the memory of the failed step for the others."""
        self._error = error if self._alone else drop_tracebacks(error)
        self._learner.optimiser.zero_grad(set_to_none=True)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        if self._random_state is None:
            yield
            return
        set_random_state(self._device, self._random_state)
        yield
        self._random_state = random_state(self._device)

    @contextmanager
    def _own_stream(self, turn: Turn) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        for tensor in _tensors(turn):  # made on the stream of the feed, used on this one
            tensor.record_stream(self._stream)


def _may_save(learners: Sequence[Learner]) -> bool:
    """Whether a state can be stored now. Of several ranks, each has its own gradients inside an update."""
    return not any(learner.ranks is not None and learner.is_inside_update for learner in learners)


def _random_of_ranks(learner: Learner) -> EpochState:
    if learner.ranks is None:
        return {}
    states = [state.cpu() for state in random_state(learner.device)]
    return {"random_of_ranks": learner.ranks.collect(states)}


def _turns(batches: Iterable[Batch], preprocessing: Preprocessing, most: int) -> Iterator[Turn]:
    """Batches with their inputs, up to `most` in a turn and no more than fill BYTES_PER_TURN."""
    turn: Turn = []
    for batch in batches:
        inputs = model_inputs(batch, preprocessing)
        turn.append((batch, inputs))
        if len(turn) == most or len(turn) * inputs.nbytes >= BYTES_PER_TURN:
            yield turn
            turn = []
    if turn:
        yield turn


def _tensors(turn: Turn) -> Iterator[Tensor]:
    for batch, inputs in turn:
        yield from (batch.pixels, batch.labels, batch.index, inputs)
        for value in (batch.labelled, batch.mixed, *batch.targets):
            parts = value if isinstance(value, tuple) else (value,)
            yield from (part for part in parts if isinstance(part, Tensor))
