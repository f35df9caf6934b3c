"""A student with all that trains it, and the training step: batch, forward, loss, backward, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cache_tools.errors import DivergedError
from cache_tools.format.recipe import Preprocessing
from cache_tools.preprocess import prepare
from cache_tools.system.joined import Joined
from train.feed import Batch, mixed_seed
from train.loop.average import WeightAverage
from train.loop.batch_norm import average_statistics, known_batch_norms
from train.loop.sums import Sums
from train.objective import Objective
from train.optim import Schedule, Update, create_optimiser, parameter_groups, trained_parameters, update_of
from train.recipe import TrainRecipe

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        self._trained = trained_parameters(self.optimiser)
        updates_per_epoch = math.ceil(steps_per_epoch / recipe.optimiser.accumulate)
        self.schedule = Schedule(recipe.schedule, self.optimiser, recipe.epochs, updates_per_epoch)
        self.average = WeightAverage(self.student, recipe.ema_decay) if recipe.ema_decay else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
        self.updates = 0
        self._has_gradients = False  # of the first batches of an update
        # A compiler makes counting nearly free, and would compile again for every number that it sees in Python.
        self._counters = BatchCounters([] if recipe.compile == "model" else self.student.modules())
        self._one = torch.ones((), device=device)  # the gradient of the loss, which torch makes in each step otherwise
        self._stream: torch.cuda.Stream | None = None
        self.means = Sums()
        if recipe.compile == "model":
            # One program for whole batches, and one for a shorter last one.
            self._terms = torch.compile(self._terms, dynamic=False)  # type: ignore[method-assign]
        self.captured: Any = None  # its `graph.TensorEpochs`, from the first epoch on
        self.ranks: Joined | None = None
        self._parallel: nn.parallel.DistributedDataParallel | None = None

    def join(self, ranks: Joined) -> None:
        """Train together with other ranks from now on. The first step takes the weights of rank 0."""
        self.ranks = self.objective.ranks = ranks

    def begin_epoch(self, epoch: int) -> None:
        """Prepare for the steps of an epoch, and seed the global random generators."""
        # Dropout and the like are a function of the epoch, and of the rank.
        own = () if self.ranks is None or self.ranks.rank.is_first else (self.ranks.rank.number,)
        torch.manual_seed(mixed_seed(self.recipe.seed, epoch, 1, *own))
        self.student.train()
        self.objective.train()
        self.objective.set_epoch(epoch)
        self.means.clear()

    def step(self, batch: Batch, inputs_NCHW: Tensor) -> None:
        """Train on a batch, at the learning rate of its update.

        Args:
            inputs_NCHW: `model_inputs` of the batch.
        """
        update = update_of(batch, self.recipe.batch_size, self.recipe.optimiser.accumulate)
        self.schedule.step_update(self.updates)
        if self.ranks is None:
            self.train_on(batch, inputs_NCHW, update)
        else:
            self._train_with_others(batch, inputs_NCHW, update)
        self._has_gradients = not update.is_last
        if update.is_last:
            self.updates += 1
            if self.average is not None:
                self.average.update(self.updates)

    def train_on(self, batch: Batch, inputs_NCHW: Tensor, update: Update) -> None:
        """Forward, loss, backward, and on the last batch of an update new weights. It reads tensors only."""
        terms, logits = (self._parallel or self._terms)(inputs_NCHW, batch, update.labels)
        if update.is_first:
            for parameter in self._trained:  # as the optimiser's `zero_grad`, without its hooks
                parameter.grad = None
        loss = terms["loss"] if update.share == 1.0 else update.share * terms["loss"]
        self.scaler.scale(loss).backward(self._one)
        if update.is_last:
            self._update()
        self.means.add(terms, logits, batch.labels, batch.mixed)

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Means over the epoch's samples, as in `train_epoch`.

        Raises:
            DivergedError: one of them is not finite.
        """
        means = self.means.compute(self.ranks)
        if self.ranks is not None:
            self._average_statistics(self.ranks)
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

    @property
    def is_inside_update(self) -> bool:
        """Whether it has gradients of the first batches of an update."""
        return self._has_gradients

    def meet(self) -> None:
        """Bring what each rank has for itself, sums and statistics, into the state of rank 0."""
        if self.ranks is not None:
            assert not self._has_gradients, "each rank has its own gradients inside an update"
            self.means.add_up(self.ranks)
            self._average_statistics(self.ranks)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on; the schedule and all random numbers are functions of counters."""
        return {
            "student": self.student.state_dict(),
            "objective": self.objective.state_dict(),
            "optimiser": _as_stored(self.optimiser.state_dict()),
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
            for parameter, gradient in zip(self._trained, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.to(parameter.device)

    def _update(self) -> None:
        """Change the weights by the gradients of the update's batches."""
        if (largest_norm := self.recipe.optimiser.clip_grad_norm) is not None:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self._trained, largest_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()

    def rates(self, first: int, count: int) -> list[list[float]]:
        """The learning rate of each group of parameters in `count` updates from `first` on."""
        rows = []
        for update in range(first, first + count):
            self.schedule.step_update(update)
            rows.append([float(group["lr"]) for group in self.optimiser.param_groups])
        return rows

    def _train_with_others(self, batch: Batch, inputs_NCHW: Tensor, update: Update) -> None:
        """`train_on` with a part of each batch on every rank; gradients meet on the last batch of an update."""
        if self._parallel is None:
            assert self.ranks is not None, "others to train with"
            unused = self._has_unused_weights(inputs_NCHW[:2])
            self._parallel = self.ranks.parallel(_StudentAndLoss(self, self._terms), some_unused=unused)
        with nullcontext() if update.is_last else self._parallel.no_sync():
            self.train_on(batch, inputs_NCHW, update)

    def _has_unused_weights(self, inputs: Tensor) -> bool:
        """Whether the loss does not depend on some of the student's weights. Found in eval mode; nothing changes."""
        loss, modes = self.recipe.loss, {module: module.training for module in self.student.modules()}
        weights = [weight for weight in self.student.parameters() if weight.requires_grad]
        self.student.eval()
        try:
            with torch.enable_grad(), self._autocast():
                logits, features = self._forward(inputs)
            used = [logits] if loss.ce_weight > 0.0 or loss.needs_logits else []
            used += [] if features is None else [features]
            gradients = torch.autograd.grad([each.sum() for each in used], weights, allow_unused=True)
        finally:
            for module, training in modes.items():
                module.training = training
        return any(gradient is None for gradient in gradients)

    def _average_statistics(self, ranks: Joined) -> None:
        average_statistics(self.student, ranks)
        if self.average is not None:
            average_statistics(self.average.module, ranks)

    def _terms(self, inputs: Tensor, batch: Batch, update_labels: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of the loss, and the logits. `--compile model` compiles this."""
        with self._autocast():
            logits, features = self._forward(inputs)
        return self.objective(logits, features, batch, update_labels), logits

    def _gradients(self) -> list[Tensor | None] | None:
        """The gradients of an update's first batches; None between two updates."""
        return [parameter.grad for parameter in self._trained] if self._has_gradients else None

    def _forward(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [B, C], and the classifier's input [B, D] if the loss has a feature term."""
        with self._counters.counting():
            if not self.recipe.loss.needs_features:
                return self.student(inputs), None
            student: Any = self.student  # timm's interface, which nn.Module does not declare
            maps = student.forward_features(inputs)
            return student.forward_head(maps), student.forward_head(maps, pre_logits=True)

    def _autocast(self) -> torch.autocast:
        precision = _PRECISIONS[self.recipe.precision]
        return torch.autocast(self.device.type, precision, enabled=precision is not torch.float32)


class BatchCounters:
    """The counters of batches in the batch norms of a student, added to in one kernel instead of one for each.

    torch itself reads them only where a batch norm has no momentum; those count for themselves.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        counting = known_batch_norms()
        norms: list[Any] = [module for module in modules if type(module) in counting]
        found = [(norm, norm._buffers["num_batches_tracked"]) for norm in norms if norm.momentum is not None]
        self._counts = [(norm._buffers, counter, _Count()) for norm, counter in found if counter is not None]

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, the batch norms count in Python."""
        if not self._counts:
            yield
            return
        try:
            for buffers, _, count in self._counts:
                count.value = 0
                buffers["num_batches_tracked"] = count
            yield
        finally:
            for buffers, counter, _ in self._counts:
                buffers["num_batches_tracked"] = counter
        called = [(counter, count.value) for _, counter, count in self._counts if count.value]
        if called:
            torch._foreach_add_([counter for counter, _ in called], [value for _, value in called])


class _Count:
    """Takes the place of a counter that a batch norm adds to."""

    value = 0

    def add_(self, more: int) -> None:
        self.value += more


class _StudentAndLoss(nn.Module):
    """All trained weights of a learner in one module, whose forward pass is the loss."""

    def __init__(self, learner: Learner, terms: Callable[..., tuple[dict[str, Tensor], Tensor]]) -> None:
        super().__init__()
        self.student, self.objective, self._terms = learner.student, learner.objective, terms

    def forward(self, inputs: Tensor, batch: Batch, update_labels: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        return self._terms(inputs, batch, update_labels)


def model_inputs(batch: Batch, preprocessing: Preprocessing) -> Tensor:
    """The input of a student: float32 [B, 3, H, W] in channels_last."""
    return prepare(batch.pixels.contiguous(memory_format=torch.channels_last), preprocessing)


def _as_stored(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimiser, whatever its calls: learning rates may be in tensors (`train.loop.graph`)."""
    groups = [{**group, "lr": float(group["lr"]), "foreach": None} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _with_settings_of(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A stored state with the settings of this optimiser. A run of the CPU, whose kernels differ, may go on on CUDA.

    They are functions of the recipe and the device, and the learning rate one of the number of updates.
    """
    groups = zip(optimiser.param_groups, state["param_groups"], strict=True)
    return {**state, "param_groups": [{**own, "params": stored["params"]} for own, stored in groups]}
