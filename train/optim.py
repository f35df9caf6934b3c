"""The optimiser and the learning-rate schedule of a recipe, and the batches that share an update."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cache_tools.errors import RecipeError
from train.feed import Batch
from train.recipe.optim import OptimiserRecipe, ScheduleRecipe

FEW_PARAMETERS = 1 << 20
ParameterGroup = dict[str, Any]
"""`params`, and optionally `weight_decay` and `lr_scale`, by which `Schedule` multiplies the learning rate."""


def parameter_groups(recipe: OptimiserRecipe, student: nn.Module, objective: nn.Module) -> list[ParameterGroup]:
    """The trained parameters of a run by learning rate and weight decay, as timm groups them.

    By default they are one group with weight decay on all of them, as in the reference implementations of the field.

    Args:
        objective: its own layers have the full learning rate.

    Raises:
        RecipeError: layer decay for a network whose layers are not known.
    """
    decay, excludes = recipe.weight_decay, recipe.weight_decay_exclusions
    if recipe.layer_decay is None and not excludes:
        return [{"params": _trained([*student.parameters(), *objective.parameters()])}]
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay  # slow to import

    unnamed: Callable[[], Collection[str]] = frozenset
    named = getattr(student, "no_weight_decay", unnamed)() if excludes else ()
    if recipe.layer_decay is None:
        groups = param_groups_weight_decay(student, decay, no_weight_decay_list=named)
    elif not hasattr(student, "group_matcher"):
        raise RecipeError(
            "layer decay needs a network whose layers are known",
            where="optimiser.layer_decay",
            expected="a network with timm's group_matcher(), such as any of timm's",
            found=type(student).__name__,
            next_step="leave optimiser.layer_decay out, or choose a --student timm:NAME",
        )
    else:
        groups = param_groups_layer_decay(
            student,
            decay,
            no_weight_decay_list=named,
            weight_decay_exclude_1d=excludes,
            layer_decay=recipe.layer_decay,
        )
    if excludes:
        return [*groups, *param_groups_weight_decay(objective, decay)]
    own = _trained(objective.parameters())
    return [*groups, *([{"params": own, "weight_decay": decay}] if own else [])]


def create_optimiser(
    recipe: OptimiserRecipe, parameters: Iterable[nn.Parameter] | Sequence[ParameterGroup]
) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW, over the trainable parameters, or over groups of them (`parameter_groups`)."""
    given = list(parameters)
    if given and isinstance(given[0], dict):
        groups: Any = given
        trained = [each for group in groups for each in group["params"]]
    else:
        groups = trained = _trained(given)  # type: ignore[arg-type]
    # One kernel on CUDA, which also leaves out the update after an overflow in float16 without asking the host.
    fused = all(parameter.is_cuda for parameter in trained) or None
    # On the CPU small networks take a few calls instead of several for each tensor, for the same bits; large ones are
    # quicker tensor by tensor, while each is in the processor's cache.
    on_cpu = all(parameter.device.type == "cpu" for parameter in trained)
    foreach = (on_cpu and sum(parameter.numel() for parameter in trained) <= FEW_PARAMETERS) or None
    if recipe.name == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=recipe.learning_rate,
            betas=(recipe.momentum, 0.999),
            weight_decay=recipe.weight_decay,
            fused=fused,
            foreach=foreach,
        )
    return torch.optim.SGD(
        groups,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=fused,
        foreach=foreach,
    )


class Update(NamedTuple):
    """What a batch contributes to an update: all of it, or its part of the gradients that several batches add up.

    Attributes:
        is_first, is_last: of the batches of the update.
        share: the batch's samples as a fraction of the update's. The sum of share · batch mean is the mean over all
            samples of the update, also where its last batch is short, or where an epoch ends before it is complete.
            On several ranks it is a rank's fraction times their number, because their gradients are averaged.
        labels: of all samples of the update; None if they are the batch's.
    """

    is_first: bool = True
    is_last: bool = True
    share: float = 1.0
    labels: Tensor | None = None


WHOLE_UPDATE = Update()


def update_of(batch: Batch, batch_size: int, accumulate: int) -> Update:
    """The update that a batch belongs to, if each takes `accumulate` batches; the last of an epoch may take fewer."""
    if accumulate == 1 and batch.sizes is None:
        return WHOLE_UPDATE
    assert batch.epoch_labels is not None, "a feed gives the labels of the epoch"
    samples, ranks = len(batch.epoch_labels), 1 if batch.sizes is None else len(batch.sizes)
    first = batch.start - batch.start % (accumulate * batch_size)
    last = min(first + accumulate * batch_size, samples)
    is_last, share = batch.start + batch.samples == last, ranks * len(batch.labels) / (last - first)
    return Update(batch.start == first, is_last, share, batch.epoch_labels[first:last])


def trained_parameters(optimiser: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimiser changes."""
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


class Schedule:
    """The learning rate of each update: call `step_update(t)` before update `t` (from 0 over the whole run).

    It is a function of `t` alone, so a resumed run needs no state of it. Cosine falls from the end of the warm-up to
    `min_learning_rate` after the last update; multistep multiplies by `gamma` from the first update of each milestone
    epoch on (epochs from 0, so milestone 150 leaves 150 epochs at the full rate). Warm-up rises linearly over its
    epochs, from nearly nothing. The rates are bit for bit those of timm's schedules, whose import takes seconds.
    """

    def __init__(
        self, recipe: ScheduleRecipe, optimiser: torch.optim.Optimizer, epochs: int, updates_per_epoch: int
    ) -> None:
        self._recipe, self._optimiser = recipe, optimiser
        self._full_rates = [float(group.setdefault("initial_lr", group["lr"])) for group in optimiser.param_groups]
        self._warmup = recipe.warmup_epochs * updates_per_epoch
        self._falling = max(epochs * updates_per_epoch - self._warmup, 1)
        milestones = recipe.milestones if recipe.name == "multistep" else ()
        self._milestones = [milestone * updates_per_epoch for milestone in milestones]
        self._first_rate = self._full_rates[0] / (self._warmup + 1)
        self.step_update(0)

    def step_update(self, update: int) -> None:
        """Set the learning rates of an update."""
        for group, full_rate in zip(self._optimiser.param_groups, self._full_rates, strict=True):
            group["lr"] = self._rate(update, full_rate) * group.get("lr_scale", 1.0)

    def _rate(self, update: int, full_rate: float) -> float:
        if update < self._warmup:
            return self._first_rate + update * ((full_rate - self._first_rate) / self._warmup)
        if self._recipe.name != "cosine":
            return full_rate * self._recipe.gamma ** bisect.bisect_right(self._milestones, update)
        lowest, fallen = self._recipe.min_learning_rate, update - self._warmup
        if fallen >= self._falling:
            return lowest
        return lowest + 0.5 * (full_rate - lowest) * (1 + math.cos(math.pi * fallen / self._falling))
