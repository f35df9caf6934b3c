"""The training step, readable in one place, and everything that a run carries from one step to the next."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from cache_tools.errors import DivergedError
from cache_tools.format.recipe import Preprocessing
from cache_tools.memory import raise_on_out_of_memory
from cache_tools.preprocess import prepare
from train.feed import Batch, Feed, mixed_seed
from train.objective import Objective
from train.recipe import OptimiserRecipe, ScheduleRecipe, TrainRecipe

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Learner:
    """A student with its objective, optimiser, schedule, average and gradient scaler.

    Args:
        student: moved to `device`, its weights as they are.
        steps_per_epoch: updates per epoch, which the schedule is counted in.
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
        self.optimiser = create_optimiser(recipe.optimiser, [*student.parameters(), *objective.parameters()])
        self.schedule = create_schedule(recipe.schedule, self.optimiser, recipe.epochs, steps_per_epoch)
        # With warm-up: after n updates the average reaches back about n^(2/3) of them, so short runs have a useful one.
        self.average = ModelEmaV3(student, recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
        self.updates = 0
        self._means = _Means()

    def train_epoch(self, feed: Feed, epoch: int, advance: Callable[[int], None]) -> dict[str, float]:
        """One pass over the feed.

        Args:
            advance: told the size of each batch after its step has been issued.

        Returns:
            Means over the samples: `loss`, its terms, and `train_top1` in training mode.

        Raises:
            DivergedError: the loss is not a finite number any more.
        """
        self.begin_epoch(epoch)
        for batch in feed.epoch(epoch):
            self.step(batch, model_inputs(batch, self.preprocessing))
            advance(len(batch.labels))
        return self.end_epoch(epoch)

    def begin_epoch(self, epoch: int) -> None:
        """Get ready for the steps of an epoch; seeds the global generators."""
        torch.manual_seed(mixed_seed(self.recipe.seed, epoch, 1))  # dropout and the like: a function of the epoch
        self.student.train()
        self.objective.train()
        self.objective.set_epoch(epoch)
        self._means = _Means()

    def step(self, batch: Batch, inputs_NCHW: Tensor) -> None:
        """Forward, loss, backward, update; `inputs_NCHW` are `model_inputs` of the batch."""
        self.schedule.step_update(self.updates)
        with self._autocast():
            logits, features = self._forward(inputs_NCHW)
        terms = self.objective(logits, features, batch)
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(terms["loss"]).backward()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.updates += 1
        if self.average is not None:
            self.average.update(self.student, self.updates)
        self._means.add(terms, logits, batch.labels)

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Means of the epoch's steps, see `train_epoch`."""
        return _finite(self._means.compute(), epoch)

    @property
    def learning_rate(self) -> float:
        """Of the last update."""
        return float(self.optimiser.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on; the schedule and all random numbers are functions of counters."""
        return {
            "student": self.student.state_dict(),
            "objective": self.objective.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.objective.load_state_dict(state["objective"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.updates = state["updates"]

    def _forward(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [B, C], and the features [B, D] in front of the classifier if the loss has a term for them."""
        if not self.recipe.loss.needs_features:
            return self.student(inputs), None
        student: Any = self.student  # timm's interface, which nn.Module does not declare
        maps = student.forward_features(inputs)
        return student.forward_head(maps), student.forward_head(maps, pre_logits=True)

    def _autocast(self) -> torch.autocast:
        precision = _PRECISIONS[self.recipe.precision]
        return torch.autocast(self.device.type, precision, enabled=precision is not torch.float32)


def model_inputs(batch: Batch, preprocessing: Preprocessing) -> Tensor:
    """What a student sees of a batch: float32 [B, 3, H, W] in channels_last."""
    return prepare(batch.pixels.contiguous(memory_format=torch.channels_last), preprocessing)


def explain_out_of_memory(recipe: TrainRecipe, device: torch.device) -> AbstractContextManager[None]:
    """Inside, running out of memory raises an OutOfMemoryError that names the student and says what to change."""
    next_step = "train with a smaller --batch-size or student, or where there is more memory"
    return raise_on_out_of_memory(f"{recipe.student} on {device}", next_step)


@contextmanager
def repeatable(device: torch.device, deterministic: bool) -> Iterator[None]:
    """Settings under which a run repeats; what they were before, random state included, is restored afterwards.

    On the CPU always deterministic (same machine, same number of threads). On CUDA only if asked for: otherwise cuDNN
    may choose the quickest algorithm.
    """
    cuda = device.type == "cuda"
    strict = deterministic or not cuda
    if cuda and strict:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    debugging: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        debugging.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )
    try:
        torch.use_deterministic_algorithms(strict, warn_only=True)
        debugging.fill_uninitialized_memory = False  # a debugging aid that costs a pass over each tensor
        torch.backends.cudnn.benchmark = not strict
        with torch.random.fork_rng(devices=[device] if cuda else []):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        debugging.fill_uninitialized_memory = before[2]
        torch.backends.cudnn.benchmark = before[3]


class _Means:
    """Sums of the loss terms and of right answers, kept on the device and read once per epoch."""

    def __init__(self) -> None:
        self._count = 0
        self._names: list[str] = []
        self._sums: Tensor | None = None  # made where it is added to: learners may have a CUDA stream each

    def add(self, terms: dict[str, Tensor], logits: Tensor, labels: Tensor) -> None:
        right = (logits.detach().argmax(1) == labels).float().mean()
        values = torch.stack([*(term.detach() for term in terms.values()), right]).double() * len(labels)
        self._sums = values if self._sums is None else self._sums + values
        self._names, self._count = [*terms, "train_top1"], self._count + len(labels)

    def compute(self) -> dict[str, float]:
        assert self._sums is not None, "an epoch has steps"
        return dict(zip(self._names, (self._sums / self._count).tolist(), strict=True))


def _finite(means: dict[str, float], epoch: int) -> dict[str, float]:
    if all(map(math.isfinite, means.values())):
        return means
    raise DivergedError(
        "the training diverged: the loss is not a finite number",
        where=f"epoch {epoch + 1}",
        found=", ".join(f"{name} {value:g}" for name, value in means.items() if name != "train_top1"),
        next_step="train with a lower --lr, a warm-up (--set schedule.warmup_epochs=1) or --precision float32",
    )


def create_optimiser(recipe: OptimiserRecipe, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW over the parameters that are trained; weight decay on all of them, as in the
    reference implementations of the field."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    # One kernel on CUDA, which also leaves out the update after an overflow in float16 without asking the host.
    fused = all(parameter.is_cuda for parameter in trained) or None
    if recipe.name == "adamw":
        return torch.optim.AdamW(
            trained,
            lr=recipe.learning_rate,
            betas=(recipe.momentum, 0.999),
            weight_decay=recipe.weight_decay,
            fused=fused,
        )
    return torch.optim.SGD(
        trained,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=fused,
    )


def create_schedule(
    recipe: ScheduleRecipe, optimiser: torch.optim.Optimizer, epochs: int, steps_per_epoch: int
) -> Scheduler:
    """A timm schedule counted in updates: call `step_update(t)` before update `t` (from 0 over the whole run).

    The learning rate is a function of `t` alone, so a resumed run needs no state of it. Cosine falls from the end of
    the warm-up to `min_learning_rate` after the last update; multistep multiplies by `gamma` from the first update of
    each milestone epoch on (epochs from 0, so milestone 150 leaves 150 epochs at the full rate). Warm-up rises
    linearly over its epochs, from nearly nothing.
    """
    total, warmup = epochs * steps_per_epoch, recipe.warmup_epochs * steps_per_epoch
    first_rate = optimiser.param_groups[0]["lr"] / (warmup + 1)
    if recipe.name == "cosine":
        return CosineLRScheduler(
            optimiser,
            t_initial=max(total - warmup, 1),
            lr_min=recipe.min_learning_rate,
            warmup_t=warmup,
            warmup_lr_init=first_rate,
            warmup_prefix=True,
            t_in_epochs=False,
        )
    milestones = recipe.milestones if recipe.name == "multistep" else ()
    return MultiStepLRScheduler(
        optimiser,
        # timm compares milestones with t + 1: one more, so that update `milestone · steps_per_epoch` is the first one.
        decay_t=[milestone * steps_per_epoch + 1 for milestone in milestones],
        decay_rate=recipe.gamma,
        warmup_t=warmup,
        warmup_lr_init=first_rate,
        warmup_prefix=False,
        t_in_epochs=False,
    )
