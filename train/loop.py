"""The training loop: an epoch of one or several students, and the step that each makes on each batch.

Students that train together share the batches: pixels, targets and augmentation are made once. On a CPU each ends with
the same weights as if trained alone, bit for bit: it gets the same batches and has its own random state for dropout. A
student that fails does not stop the others.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from cache_tools.errors import DivergedError, RecipeError
from cache_tools.format.recipe import Preprocessing
from cache_tools.preprocess import prepare
from cache_tools.system.devices import in_float64
from cache_tools.system.memory import drop_tracebacks, raise_on_out_of_memory
from train.feed import Batch, Feed, MixedLabels, mixed_seed
from train.objective import Objective
from train.optim import create_optimiser, create_schedule, parameter_groups, trained_parameters, update_of
from train.recipe import TrainRecipe

EpochOutcome = dict[str, float] | Exception
EpochState = dict[str, Any]
"""All that a learner needs to continue inside an epoch: plain values and tensors."""
Save = Callable[[Callable[[], list[EpochState | None]]], None]
"""Called between two turns with a function that makes the state of each learner, None for one that has stopped."""
Turn = list[tuple[Batch, Tensor]]
"""The batches that one student trains on in a row, each with its `model_inputs`."""

# On a CPU a student takes several steps in a row: its weights, gradients and momentum stay in the processor's cache.
BATCHES_PER_TURN, BYTES_PER_TURN = 8, 64 << 20
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    for turn in _turns(feed.epoch(epoch, done), learners[0].preprocessing, batches):
        for participant in participants:
            participant.train(turn[max(participant.done - done, 0) :])
        advance(sum(len(batch.labels) for batch, _ in turn))
        done += len(turn)
        if save is not None and done < feed.steps_per_epoch:
            save(lambda: [participant.state() for participant in participants])
    return [participant.outcome(epoch) for participant in participants]


class Learner:
    """A student with its objective, optimiser, schedule, average and gradient scaler.

    Args:
        student: moved to `device`; its weights stay as they are.
        steps_per_epoch: batches per epoch; the schedule counts updates, each of one or several batches.

    Attributes:
        updates: number of updates of the weights so far.
        means: running sums of the figures of the epoch.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        student: nn.Module,
        objective: Objective,
        preprocessing: Preprocessing,
        steps_per_epoch: int,
        device: torch.device,
    ) -> None:
        self.recipe, self.device, self.preprocessing = recipe, device, preprocessing
        # channels_last: tensor cores want it, and on the CPU it is a fifth quicker in float32 and bfloat16.
        self.student = student.to(device).to(memory_format=torch.channels_last)
        self.objective = objective.to(device)
        self.optimiser = create_optimiser(recipe.optimiser, parameter_groups(recipe.optimiser, student, objective))
        updates_per_epoch = math.ceil(steps_per_epoch / recipe.optimiser.accumulate)
        self.schedule = create_schedule(recipe.schedule, self.optimiser, recipe.epochs, updates_per_epoch)
        # With warm-up: after n updates the average reaches back about n^(2/3) of them, so that short runs also get a
        # useful average.
        self.average = ModelEmaV3(student, recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
        self.updates = 0
        self._has_gradients = False  # of the first batches of an update
        self._stream: torch.cuda.Stream | None = None
        self.means = _Means()

    def begin_epoch(self, epoch: int) -> None:
        """Prepare for the steps of an epoch, and seed the global random generators."""
        torch.manual_seed(mixed_seed(self.recipe.seed, epoch, 1))  # dropout and the like: a function of the epoch
        self.student.train()
        self.objective.train()
        self.objective.set_epoch(epoch)
        self.means = _Means()

    def step(self, batch: Batch, inputs_NCHW: Tensor) -> None:
        """Forward, loss, backward, and, on the last batch of an update, the update.

        Args:
            inputs_NCHW: `model_inputs` of the batch.
        """
        update = update_of(batch, self.recipe.batch_size, self.recipe.optimiser.accumulate)
        self.schedule.step_update(self.updates)
        with self._autocast():
            logits, features = self._forward(inputs_NCHW)
        terms = self.objective(logits, features, batch, update.labels)
        if update.is_first:
            self.optimiser.zero_grad(set_to_none=True)
        loss = terms["loss"] if update.share == 1.0 else update.share * terms["loss"]
        self.scaler.scale(loss).backward()
        self._has_gradients = not update.is_last
        if update.is_last:
            self._update()
        self.means.add(terms, logits, batch.labels, batch.mixed)

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Means over the epoch's samples, as in `train_epoch`.

        Raises:
            DivergedError: one of them is not finite.
        """
        means = self.means.compute()
        if all(map(math.isfinite, means.values())):
            return means
        raise DivergedError(
            "the training diverged: the loss is not a finite number",
            where=f"epoch {epoch + 1}",
            found=", ".join(f"{name} {value:g}" for name, value in means.items() if name != "train_top1"),
            next_step="train with a lower --lr, --clip-grad-norm 1, a warm-up (--set schedule.warmup_epochs=1) or "
            "--precision float32",
        )

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """A CUDA stream of its own, the same in every epoch: torch reuses freed memory on the same stream only."""
        if self._stream is None and self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
        return self._stream

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last update; with layer decay, that of the classifier."""
        return float(max(group["lr"] for group in self.optimiser.param_groups))

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on; the schedule and all random numbers are functions of counters."""
        return {
            "student": self.student.state_dict(),
            "objective": self.objective.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "updates": self.updates,
            "gradients": self._gradients(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.objective.load_state_dict(state["objective"])
        self.optimiser.load_state_dict(_with_settings_of(self.optimiser, state["optimiser"]))
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.updates = state["updates"]
        gradients = state.get("gradients")  # states of earlier versions have none
        self._has_gradients = gradients is not None
        if gradients is not None:
            for parameter, gradient in zip(trained_parameters(self.optimiser), gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.to(parameter.device)

    def _update(self) -> None:
        """Change the weights by the gradients of the update's batches."""
        if (largest_norm := self.recipe.optimiser.clip_grad_norm) is not None:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(trained_parameters(self.optimiser), largest_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.updates += 1
        if self.average is not None:
            self.average.update(self.student, self.updates)

    def _gradients(self) -> list[Tensor | None] | None:
        """The gradients of an update's first batches; None between two updates."""
        return [parameter.grad for parameter in trained_parameters(self.optimiser)] if self._has_gradients else None

    def _forward(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [B, C], and the classifier's input [B, D] if the loss has a feature term."""
        if not self.recipe.loss.needs_features:
            return self.student(inputs), None
        student: Any = self.student  # timm's interface, which nn.Module does not declare
        maps = student.forward_features(inputs)
        return student.forward_head(maps), student.forward_head(maps, pre_logits=True)

    def _autocast(self) -> torch.autocast:
        precision = _PRECISIONS[self.recipe.precision]
        return torch.autocast(self.device.type, precision, enabled=precision is not torch.float32)


def _with_settings_of(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A stored state with the settings of this optimiser. A run of the CPU, whose kernels differ, may go on on CUDA.

    They are functions of the recipe and the device, and the learning rate one of the number of updates.
    """
    groups = zip(optimiser.param_groups, state["param_groups"], strict=True)
    return {**state, "param_groups": [{**own, "params": stored["params"]} for own, stored in groups]}


def model_inputs(batch: Batch, preprocessing: Preprocessing) -> Tensor:
    """The input of a student: float32 [B, 3, H, W] in channels_last."""
    return prepare(batch.pixels.contiguous(memory_format=torch.channels_last), preprocessing)


@contextmanager
def repeatable(device: torch.device, deterministic: bool) -> Iterator[None]:
    """Make torch repeatable inside the context; its settings and random state are restored on exit.

    Runs on the CPU always repeat (same machine, same number of threads). Runs on CUDA repeat only if `deterministic`:
    otherwise cuDNN may choose the quickest algorithm. Where an operation cannot repeat on CUDA, torch then raises an
    error (`explain_failure`).
    """
    cuda = device.type == "cuda"
    strict = deterministic or not cuda
    if cuda and strict:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    debugging: Any = torch.utils.deterministic
    random_state = _random_state(device)
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        debugging.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )
    try:
        torch.use_deterministic_algorithms(strict, warn_only=not cuda)
        debugging.fill_uninitialized_memory = False  # a debugging aid that costs a pass over each tensor
        torch.backends.cudnn.benchmark = not strict
        yield
    finally:
        _set_random_state(device, random_state)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        debugging.fill_uninitialized_memory = before[2]
        torch.backends.cudnn.benchmark = before[3]


@contextmanager
def explain_failure(recipe: TrainRecipe, device: torch.device) -> Iterator[None]:
    """Inside, failures of torch that a user can do something about become errors that say what.

    Raises:
        OutOfMemoryError: too little memory; names the student.
        RecipeError: `deterministic`, and an operation that has no deterministic kernel on CUDA.
    """
    next_step = (
        "train with a smaller --batch-size (--accumulate N keeps updates as large) or student, "
        "or where there is more memory"
    )
    try:
        with raise_on_out_of_memory(f"{recipe.student} on {device}", next_step):
            yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise RecipeError(
            "the run cannot repeat bit for bit: an operation has no deterministic kernel",
            where=f"{recipe.student} on {device}",
            found=str(error).split(" does not ")[0][:200],
            next_step="train with --set deterministic=false, choose another student or loss, or train on the CPU",
        ) from error


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
            _set_random_state(self._device, begun["random"])
        self._random_state = None if alone else _random_state(self._device)

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

    def state(self) -> EpochState | None:
        """The state after the last turn; None after an error."""
        if self._error is not None:
            return None
        self._join()
        return {
            "learner": self._learner.state_dict(),
            "batches": self.done,
            "means": self._learner.means.state_dict(),
            "random": self._random_state or _random_state(self._device),
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
        _set_random_state(self._device, self._random_state)
        yield
        self._random_state = _random_state(self._device)

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


class _Means:
    """Running sums of the loss terms and of right answers, on the device; read once per epoch.

    torchmetrics' MeanMetric would do the same in a metric per term, at several times the cost for every step.
    """

    def __init__(self) -> None:
        self._count = 0
        self._names: list[str] = []
        self._sums: Tensor | None = None  # created by the first step, on its CUDA stream

    def add(self, terms: dict[str, Tensor], logits: Tensor, labels: Tensor, mixed: MixedLabels | None = None) -> None:
        figures = {name: term.detach() for name, term in terms.items()}
        if labels.ndim == 1:  # of several labels none is the right one
            top1 = logits.detach().argmax(1)
            right = (top1 == labels).float()
            if mixed is not None:
                right = torch.lerp((top1 == mixed.partner).float(), right, mixed.share)
            figures["train_top1"] = right.mean()
        values = in_float64(torch.stack(list(figures.values()))) * len(labels)
        self._sums = values if self._sums is None else self._sums.to(values) + values
        self._names, self._count = list(figures), self._count + len(labels)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "names": self._names, "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count, self._names, self._sums = state["count"], state["names"], state["sums"]

    def compute(self) -> dict[str, float]:
        assert self._sums is not None, "an epoch has steps"
        return dict(zip(self._names, (self._sums / self._count).tolist(), strict=True))


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


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "mps":
        return [*states, torch.mps.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) == 1:  # of the CPU, or of a checkpoint from one
        return
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states[1])


def _tensors(turn: Turn) -> Iterator[Tensor]:
    for batch, inputs in turn:
        yield from (batch.pixels, batch.labels, batch.index, inputs)
        for value in (batch.labelled, batch.mixed, *batch.targets):
            parts = value if isinstance(value, tuple) else (value,)
            yield from (part for part in parts if isinstance(part, Tensor))
