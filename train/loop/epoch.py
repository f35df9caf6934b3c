"""An epoch of one or several students.

Students that train together share the batches: pixels, targets and augmentation are made once. On a CPU each ends with
the same weights as if trained alone, bit for bit: it gets the same batches and has its own random state for dropout. A
student that fails does not stop the others.

On CUDA each student has a stream of its own. Where all pixels of an epoch are on the device, and there is room for all
its targets, the batches of the whole epoch are made before its first step. The streams wait for them once, read the
same tensors, and then run freely until the epoch ends. Otherwise every stream waits for every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from cache_tools.errors import DivergedError
from cache_tools.format.recipe import Preprocessing
from cache_tools.system.memory import drop_tracebacks, free_memory
from train.feed import Batch, Feed, ResidentFeed
from train.loop.graph import EpochBuffers, TensorEpochs
from train.loop.learner import Learner, model_inputs
from train.loop.repeat import explain_failure, random_state, set_random_state
from train.recipe import TrainRecipe

EpochOutcome = dict[str, float] | Exception
EpochState = dict[str, Any]
"""All that a learner needs to continue inside an epoch: plain values and tensors."""
Save = Callable[[Callable[[], list[EpochState | None]]], None]
"""Called between two turns with a function that makes the state of each learner, None for one that has stopped."""
Turn = list[tuple[Batch, Tensor | None]]
"""The batches that one student trains on in a row, each with its `model_inputs`; None for each student to make them."""

# On a CPU a student takes several steps in a row: its weights, gradients and momentum stay in the processor's cache.
BATCHES_PER_TURN, BYTES_PER_TURN = 8, 64 << 20
EPOCH_SHARE = 0.25
"""Of the free memory of the device, for the targets of an epoch whose batches are made at once."""


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
    if all(learner.recipe.compile == "step" for learner in learners):
        try:
            _train_in_tensors(participants, feed, epoch, advance, save)
        finally:
            for participant in participants:
                participant.join()
        return [participant.outcome(epoch) for participant in participants]
    coming: Iterable[Batch] = feed.epoch(epoch, done)
    made: list[Batch] | None = None
    if not alone and _shares_buffers(feed):
        made, coming = _made_at_once(feed, iter(coming))
    if made is None:
        turns = _turns(coming, learners[0].preprocessing, batches)
    else:
        turns = iter([[(batch, None)] for batch in made])
        ready = _event_now(feed.device)
        for participant in participants:
            participant.wait_for_epoch(ready)
    try:
        for turn in turns:
            for participant in participants:
                participant.train(turn[max(participant.done - done, 0) :])
            advance(sum(batch.samples for batch, _ in turn))
            done += len(turn)
            if all(participant.has_failed for participant in participants):
                break
            if save is not None and done < feed.steps_per_epoch and _may_save(learners):
                save(lambda: [participant.state() for participant in participants])
    finally:
        for participant in participants:  # before anything that they read is freed
            participant.join()
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
        self._has_epoch = False  # its stream has waited for all batches
        self._is_read = False  # the current stream may still copy its state
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

    @property
    def recipe(self) -> TrainRecipe:
        return self._learner.recipe

    @property
    def buffers(self) -> EpochBuffers | None:
        """The buffers of its earlier epochs, for `update`."""
        captured: TensorEpochs | None = self._learner.captured
        return None if captured is None else captured.buffers

    def train(self, turn: Turn) -> None:
        """Make a step on each batch of a turn, unless an earlier one failed."""
        if self._error is not None or not turn:
            return
        with self._failing(), self._own_random_state(), self._own_stream(turn):
            for batch, inputs in turn:
                own = model_inputs(batch, self._learner.preprocessing) if inputs is None else inputs
                self._learner.step(batch, own)
            self.done += len(turn)

    def finish_update(self, feed: Feed, epoch: int) -> None:
        """Make the rest of an update that has begun, batch by batch."""
        begun = -self.done % self._learner.recipe.optimiser.accumulate
        if self._error is None and begun:
            for turn in _turns(islice(feed.epoch(epoch, self.done), begun), self._learner.preprocessing, 1):
                self.train(turn)

    def begin_in_tensors(self, buffers: EpochBuffers, ready: torch.cuda.Event | None) -> None:
        """Prepare for `update`, behind the work that fills the buffers."""
        learner = self._learner
        self.wait_for_epoch(ready)
        with self._failing(), self._own_stream([]):
            if learner.captured is None or learner.captured.buffers is not buffers:
                capture = self._device.type == "cuda"
                learner.captured = TensorEpochs(learner, buffers, capture=capture, beside_others=not self._alone)
            learner.captured.begin(self.done)

    def update(self) -> None:
        """Make the next update from the buffers."""
        # On CUDA a student that draws random numbers is refused beside others.
        own_random_state = nullcontext() if self._device.type == "cuda" else self._own_random_state()
        with self._failing(), self._own_stream([]), own_random_state:
            self.done = self._learner.captured.update(self.done)

    def fail(self, error: Exception) -> None:
        """Keep the error, and free the memory of the failed step for the others."""
        self._error = error if self._alone else drop_tracebacks(error)
        self._learner.optimiser.zero_grad(set_to_none=True)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def state(self) -> EpochState | None:
        """The state after the last turn; None after an error."""
        if self._error is not None:
            return None
        self.join()
        self._is_read = True
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
        try:
            return self._learner.end_epoch(epoch)
        except DivergedError as error:
            return error

    def wait_for_epoch(self, ready: torch.cuda.Event | None) -> None:
        """Let the learner's stream wait for all batches of the epoch, and for none of them again."""
        self._has_epoch = True
        if self._stream is not None and ready is not None:
            self._stream.wait_event(ready)

    def join(self) -> None:
        """Let the current stream wait for the learner's own."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Inside, an error stops this learner alone."""
        try:
            with explain_failure(self._learner.recipe, self._device):
                yield
        except Exception as error:
            self.fail(error)

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
        if not self._has_epoch or self._is_read:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            self._is_read = False
        with torch.cuda.stream(self._stream):
            yield
        # Made on the stream of the feed, used on this one. Those of a whole epoch are kept until the streams join.
        for tensor in () if self._has_epoch else _tensors(turn):
            tensor.record_stream(self._stream)


def _train_in_tensors(
    participants: Sequence[_Participant], feed: Feed, epoch: int, advance: Callable[[int], None], save: Save | None
) -> None:
    """Make the rest of an epoch's updates from buffers, on CUDA as graphs: whoever is behind makes the next one."""
    reported = min(participant.done for participant in participants)
    for participant in participants:
        participant.finish_update(feed, epoch)
    try:
        with explain_failure(participants[0].recipe, feed.device):
            buffers = next((one.buffers for one in participants if one.buffers and one.buffers.feed is feed), None)
            buffers = buffers or EpochBuffers(feed)
            buffers.fill(epoch)
    except Exception as error:
        for participant in participants:
            participant.fail(error)
        return
    ready = None if len(participants) == 1 else _event_now(feed.device)
    for participant in participants:
        if not participant.has_failed:
            participant.begin_in_tensors(buffers, ready)
    while alive := [participant for participant in participants if not participant.has_failed]:
        done = min(participant.done for participant in alive)
        if done > reported:
            first = feed.bounds[reported][0]
            advance(feed.bounds[done - 1][1] - first)
            reported = done
            if save is not None and done < feed.steps_per_epoch:
                save(lambda: [participant.state() for participant in participants])
        if done >= feed.steps_per_epoch:
            return
        for participant in alive:
            if participant.done == done:
                participant.update()


def _shares_buffers(feed: Feed) -> bool:
    """Whether several students can read the batches of a whole epoch, each on a stream of its own."""
    return feed.device.type == "cuda" and isinstance(feed, ResidentFeed) and not feed.has_windows


def _made_at_once(feed: Feed, batches: Iterator[Batch]) -> tuple[list[Batch] | None, Iterable[Batch]]:
    """All batches of an epoch, or None and the batches one by one if their targets would take too much memory.

    Pixels and labels of a batch are parts of the epoch's own tensors. Its targets are gathered batch by batch, because
    a kernel may sum a row in another order in a batch of another size.
    """
    first = next(batches, None)
    if first is None:
        return [], ()
    wanted = feed.steps_per_epoch * sum(tensor.nbytes for tensor in _of_targets(first))
    if wanted > EPOCH_SHARE * free_memory(feed.device):
        return None, chain([first], batches)
    return [first, *batches], ()


def _event_now(device: torch.device) -> torch.cuda.Event | None:
    """An event behind all work of the current stream; None where there are no streams."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


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
        yield from (batch.pixels, batch.labels, batch.index)
        yield from _in((inputs, batch.labelled, batch.mixed))
        yield from _of_targets(batch)


def _of_targets(batch: Batch) -> Iterator[Tensor]:
    return _in(batch.targets)


def _in(values: Iterable[object]) -> Iterator[Tensor]:
    """The tensors among values and in tuples of them."""
    for value in values:
        if isinstance(value, tuple):
            yield from _in(value)
        elif isinstance(value, Tensor):
            yield value
