"""Suggest settings to try next, with Optuna's samplers. Optuna is imported only when a search starts."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cache_tools.errors import RecipeError
from train.sweep.search_recipe import Axis, Range, Search, larger_is_better

if TYPE_CHECKING:
    import optuna

Status = Literal["finished", "stopped", "failed"]


class Outcome(NamedTuple):
    """The outcome of a trial: its metric, None if it has none, after a number of epochs."""

    status: Status
    value: float | None
    epochs: int


class Suggestions:
    """Suggested settings, from a new Optuna study.

    Args:
        search: sampler, seed and metric.
        space: dotted key → range or choices; a key with a single choice is in every suggestion.

    Raises:
        RecipeError: Optuna is not installed.
    """

    def __init__(self, search: Search, space: Mapping[str, Axis]) -> None:
        check_installed()
        self._fixed = {key: axis[0] for key, axis in space.items() if not isinstance(axis, Range) and len(axis) == 1}
        self._space = {key: axis for key, axis in space.items() if key not in self._fixed}
        self._order = tuple(space)
        self._asked: list[optuna.Trial] = []
        with _quiet() as optuna:
            self._distributions = {key: _distribution(axis) for key, axis in self._space.items()}
            direction = "maximize" if larger_is_better(search.metric) else "minimize"
            sampler = _rounding(_sampler(search), self._space, fixed=search.sampler == "qmc")
            self.study = optuna.create_study(direction=direction, sampler=sampler)

    def __len__(self) -> int:
        """Number of suggestions so far."""
        return len(self._asked)

    def ask(self) -> dict[str, Any]:
        """The settings of the next trial."""
        with _quiet():
            trial = self.study.ask(self._distributions)
        self._asked.append(trial)
        drawn = {key: _chosen(self._space[key], value) for key, value in trial.params.items()} | self._fixed
        return {key: drawn[key] for key in self._order}

    def tell(self, number: int, outcome: Outcome) -> None:
        """Report the outcome of a suggestion: COMPLETE, PRUNED with its last value, or FAIL in Optuna's terms.

        Args:
            number: of the suggestion, from 0.
        """
        trial = self._asked[number]
        with _quiet() as optuna:
            State = optuna.trial.TrialState
            if outcome.status == "failed" or outcome.value is None:
                self.study.tell(trial, state=State.FAIL)
            elif outcome.status == "stopped":
                trial.report(outcome.value, outcome.epochs)
                self.study.tell(trial, state=State.PRUNED)
            else:
                self.study.tell(trial, outcome.value)


def check_installed() -> None:
    """Raise a RecipeError that says what to install if Optuna cannot be imported."""
    try:
        importlib.import_module("optuna")
    except Exception as error:  # a broken package may raise anything
        raise RecipeError(
            "a search needs Optuna, which cannot be imported",
            where="search",
            found=(str(error).splitlines() or [type(error).__name__])[0],
            next_step="install it: pip install 'teacher-cache[search]', or list the values of a grid",
        ) from error


@contextmanager
def _quiet() -> Iterator[Any]:
    """Optuna without its log and without its warnings about experimental features."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield optuna
    finally:
        optuna.logging.set_verbosity(before)


def _sampler(search: Search) -> optuna.samplers.BaseSampler:
    from optuna import samplers

    makers: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        # Trials without an outcome count as poor ones, so that suggestions of one round differ.
        "tpe": lambda: samplers.TPESampler(seed=search.seed, multivariate=True, constant_liar=True),
        "gp": lambda: samplers.GPSampler(seed=search.seed),
        "qmc": lambda: samplers.QMCSampler(seed=search.seed, scramble=True),
        "random": lambda: samplers.RandomSampler(seed=search.seed),
    }
    return makers[search.sampler]()


def _distribution(axis: Axis) -> optuna.distributions.BaseDistribution:
    from optuna import distributions

    if not isinstance(axis, Range):  # by index: choices may be lists or mappings, which Optuna does not take
        return distributions.CategoricalDistribution(range(len(axis)))
    if axis.whole:
        return distributions.IntDistribution(int(axis.low), int(axis.high), axis.on_log_scale, int(axis.step or 1))
    step = None if axis.step is None else float(axis.step)
    return distributions.FloatDistribution(float(axis.low), float(axis.high), axis.on_log_scale, step)


def _chosen(axis: Axis, drawn: Any) -> Any:
    return drawn if isinstance(axis, Range) else axis[drawn]


def _rounding(
    sampler: optuna.samplers.BaseSampler, space: Mapping[str, Axis], *, fixed: bool
) -> optuna.samplers.BaseSampler:
    """Wrap a sampler so that its numbers are rounded: then Optuna records the values that are trained.

    Args:
        fixed: give the sampler the whole space from the first trial on. QMC would wait for a finished trial.
    """
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

    def rounded(name: str, value: Any) -> Any:
        axis = space[name]
        return axis.rounded(value) if isinstance(axis, Range) else value

    class Rounding(BaseSampler):
        def infer_relative_search_space(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial
        ) -> dict[str, BaseDistribution]:
            if fixed:
                return {name: _distribution(axis) for name, axis in space.items()}
            return sampler.infer_relative_search_space(study, trial)

        def sample_relative(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: dict[str, BaseDistribution]
        ) -> dict[str, Any]:
            drawn = sampler.sample_relative(study, trial, search_space)
            return {name: rounded(name, value) for name, value in drawn.items()}

        def sample_independent(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial, param_name: str, distribution: BaseDistribution
        ) -> Any:
            return rounded(param_name, sampler.sample_independent(study, trial, param_name, distribution))

        def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            sampler.before_trial(study, trial)

        def after_trial(
            self,
            study: optuna.Study,
            trial: optuna.trial.FrozenTrial,
            state: optuna.trial.TrialState,
            values: Sequence[float] | None,
        ) -> None:
            sampler.after_trial(study, trial, state, values)

    return Rounding()
