"""What a search for hyper-parameters asks for: ranges and choices, how many trials, by which sampler. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, NonNegativeInt, PositiveInt, Tag, model_validator

from cache_tools.config import FIELDS, SEVERAL, Frozen
from cache_tools.errors import RecipeError

LOG_FROM = 10  # ranges that span so many times their lower end are searched on a log scale
_STEPS = 1000  # of a range without a step: values are rounded to about this part of it, so that names stay short


class Range(Frozen):
    """The numbers from `low` to `high`, both included: whole ones where both ends are.

    Attributes:
        log: search on a log scale; None does where `high` is at least ten times `low`, which is above 0.
        step: only `low`, `low + step`, …
    """

    low: int | float
    high: int | float
    log: bool | None = None
    step: int | float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise RecipeError(
                "not a range", where="search.space", expected="low below high", found=f"{self.low} and {self.high}"
            )
        if self.log and self.low <= 0:
            raise RecipeError(
                "a log scale begins above 0", where="search.space", expected="low above 0", found=self.low
            )
        if self.log and self.step is not None:
            raise RecipeError("a log scale has no steps", where="search.space", expected="log or step")
        return self

    @property
    def whole(self) -> bool:
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    @property
    def on_log_scale(self) -> bool:
        if self.log is None:
            return self.step is None and self.low > 0 and self.high >= LOG_FROM * self.low
        return self.log

    def rounded(self, value: float) -> float:
        """The nearest number with no more digits than tell a thousandth of the range apart, within the range."""
        if self.whole:
            return round(value)
        if self.step is not None:
            digits = 12  # what is exact in decimals looks like it
            return float(f"{value:.{digits}g}")
        spread = value * math.log(self.high / self.low) if self.on_log_scale else self.high - self.low
        near = round(value, math.ceil(-math.log10(spread / _STEPS)))
        return float(min(max(near, self.low), self.high))


Choices = tuple[Any, ...]
Axis = Annotated[
    Annotated[Range, Tag(FIELDS)] | Annotated[Choices, Tag(SEVERAL)],
    Discriminator(lambda value: SEVERAL if isinstance(value, list | tuple) else FIELDS),
    BeforeValidator(lambda value: parse_range(value) or value if isinstance(value, str) else value),
]


class Search(Frozen):
    """A search in place of the product of all values: what is tried next depends on what came before.

    Attributes:
        trials: suggestions in all; one that comes again is not trained again.
        together: suggestions asked for at a time. They are trained side by side, and none knows of the others' results.
        metric: what decides, at the last epoch: a column of a run's metrics, such as `test_top1` or `test_nll`.
        sampler: Optuna's: `tpe` (tree-structured Parzen estimator), `gp` (Gaussian process), `qmc` (Sobol) or `random`.
        seed: of the sampler.
        space: dotted recipe keys (or `lr`, `temperature`, `weight_decay`), `student` or `loss`: a range (also as text,
            see `parse_range`) or a list of choices.
    """

    trials: PositiveInt = 30
    together: PositiveInt = 4
    metric: str = "test_top1"
    sampler: Literal["tpe", "gp", "qmc", "random"] = "tpe"
    seed: NonNegativeInt = 0
    space: dict[str, Axis] = Field(default_factory=dict)


def edges(space: Mapping[str, Axis]) -> Iterator[dict[str, Any]]:
    """Settings in which every choice and both ends of every range occur: if these are right, so are all keys."""
    values = {key: (axis.low, axis.high) if isinstance(axis, Range) else axis for key, axis in space.items()}
    first = {key: choices[0] for key, choices in values.items()}
    yield first
    for key, choices in values.items():
        yield from ({**first, key: choice} for choice in choices[1:])


def larger_is_better(metric: str) -> bool:
    """Whether the trial with the larger value of a metric is the better one."""
    return not any(word in metric for word in ("loss", "nll", "ece", "brier"))


def parse_range(text: str) -> dict[str, Any] | None:
    """`LOW..HIGH`, `LOW..HIGH:log`, `:linear` or `:STEP` as plain data for `Range`; None if it is none of these.

    Raises:
        RecipeError: ends or a scale that cannot be read.
    """
    low, dots, rest = text.partition("..")
    if not dots:
        return None
    high, colon, scale = rest.partition(":")
    data: dict[str, Any] = {"low": _number(low, text), "high": _number(high, text)}
    if colon:
        scale = scale.strip()
        data |= {"log": scale == "log"} if scale in {"log", "linear"} else {"step": _number(scale, text)}
    return data


def _number(word: str, text: str) -> int | float:
    try:
        return int(word)
    except ValueError:
        pass
    try:
        return float(word)
    except ValueError:
        expected = "such as 0.01..0.5, 1..8:linear, 16..64:16"
        raise RecipeError("a range that cannot be read", where=text, expected=expected, found=word.strip()) from None
