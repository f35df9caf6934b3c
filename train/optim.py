"""The optimiser and the learning-rate schedule of a recipe."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from train.recipe import OptimiserRecipe, ScheduleRecipe


def create_optimiser(recipe: OptimiserRecipe, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW, over the trainable parameters, with weight decay on all of them as in the reference
    implementations of the field."""
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
