"""The recipe of a search for hyper-parameters: ranges and choices, number of trials, sampler. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from cache_tools.config import FIELDS, SEVERAL, Frozen
from cache_tools.config.fields import MAX_TRIALS, Count, Number, Seed, Whole
from cache_tools.errors import RecipeError
from cache_tools.screen import nats

LOG_FROM = 10  # a range is searched on a log scale if its upper end is at least this many times its lower end
_STEPS = 1000  # values of a range without a step are rounded to about this part of it, to keep names short


class Range(Frozen):
    """The numbers from `low` to `high`, both included: whole numbers if both ends are whole.

    Attributes:
        log: search on a log scale; None means where `low` is above 0 and `high` at least ten times `low`.
        step: search only `low`, `low + step`, …
    """

    low: Whole | Number
    high: Whole | Number
    log: bool | None = None
    step: Annotated[Whole | Number, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise RecipeError(
                "not a range", where="search.space", expected="low below high", found=f"{self.low} and {self.high}"
            )
        if self.log and self.low <= 0:
            raise RecipeError(
                "a log scale starts above 0", where="search.space", expected="low above 0", found=self.low
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
        """The value within the range, rounded to about a thousandth of it."""
        if self.whole:
            return round(value)
        if self.step is not None:
            return float(f"{value:.12g}")  # 0.65, not 0.6500000000000001
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
    """A search instead of the product of all values: the next trials depend on the outcomes of earlier ones.

    Attributes:
        trials: number of suggestions; settings that are suggested twice are trained once.
        together: suggestions per round. They are trained side by side, without knowing each other's outcomes.
        metric: a column of a run's metrics, such as `test_top1` or `test_nll`, taken at the last epoch.
        sampler: `tpe` (tree-structured Parzen estimator), `gp` (Gaussian process), `qmc` (Sobol) or `random`.
        seed: of the sampler.
        space: dotted recipe keys (or `lr`, `temperature`, `weight_decay`), `student` or `loss`: a range (also as text,
            see `parse_range`) or a list of choices.
    """

    trials: Annotated[Count, Field(le=MAX_TRIALS)] = 30
    together: Annotated[Count, Field(le=MAX_TRIALS)] = 4
    metric: str = "test_top1"
    sampler: Literal["tpe", "gp", "qmc", "random"] = "tpe"
    seed: Seed = 0
    space: dict[str, Axis] = Field(default_factory=dict)


def edges(space: Mapping[str, Axis]) -> Iterator[dict[str, Any]]:
    """A few settings that contain every choice and both ends of every range, to check a space before a search."""
    values = {key: (axis.low, axis.high) if isinstance(axis, Range) else axis for key, axis in space.items()}
    first = {key: choices[0] for key, choices in values.items()}
    yield first
    for key, choices in values.items():
        yield from ({**first, key: choice} for choice in choices[1:])


def figure_text(metric: str, value: float) -> str:
    """A figure of a run as text: accuracies in per cent, all others as they are."""
    return f"{value:.2%}" if metric.endswith(("top1", "top5", "map")) else nats(value)


def larger_is_better(metric: str) -> bool:
    """Whether a larger value of the metric is better."""
    return not any(word in metric for word in ("loss", "nll", "ece", "brier", "bce"))


def parse_range(text: str) -> dict[str, Any] | None:
    """Parse `LOW..HIGH`, with `:log`, `:linear` or `:STEP` after it, into plain data for `Range`; None without `..`.

    Raises:
        RecipeError: the ends or the scale cannot be read.
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
