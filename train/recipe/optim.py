"""The settings of the optimiser and of the learning-rate schedule. Importable without torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from cache_tools.config import Extensible, Frozen
from cache_tools.config.fields import BelowOne, Count, CountOrZero, NotNegative, Positive
from cache_tools.errors import RecipeError


class OptimiserRecipe(Extensible):
    """SGD with momentum, or AdamW (whose first beta is `momentum`).

    Attributes:
        clip_grad_norm: largest norm of the gradients of all trained parameters as one vector; None for no limit.
        weight_decay_exclusions: whether weight decay leaves out what timm leaves out: biases, norms and other vectors,
            and the parameters that the network's `no_weight_decay()` names. By default all parameters decay.
        layer_decay: the learning rate of a layer is this times that of the next one; the classifier has the full rate.
            For networks whose layers are known, as timm's are (`group_matcher`). None for one rate.
        accumulate: batches per update: their gradients add up to that of a batch as large as all of them.
    """

    added: ClassVar[frozenset[str]] = frozenset(
        {"clip_grad_norm", "accumulate", "weight_decay_exclusions", "layer_decay"}
    )

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Positive = 0.05
    momentum: BelowOne = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 5e-4
    weight_decay_exclusions: bool = False
    layer_decay: Annotated[Positive, Field(le=1.0)] | None = None
    clip_grad_norm: Positive | None = None
    accumulate: Count = 1

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimiserRecipe:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0.0):
            raise RecipeError("nesterov is for sgd with a momentum above 0", where="optimiser", found=self.name)
        return self


class ScheduleRecipe(Frozen):
    """How the learning rate changes, update by update; epochs count from 0."""

    name: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup_epochs: CountOrZero = 0
    milestones: tuple[Count, ...] = ()
    gamma: Positive = 0.1
    min_learning_rate: NotNegative = 0.0

    @model_validator(mode="after")
    def _milestones_rise(self) -> ScheduleRecipe:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise RecipeError("milestones must rise", where="schedule.milestones", found=list(self.milestones))
        if self.name == "multistep" and not self.milestones:
            raise RecipeError(
                "the multistep schedule needs milestones", where="schedule", expected="such as [150, 180]"
            )
        return self
