"""Search for hyper-parameters: ask Optuna for a few trials, train them side by side, tell Optuna their outcomes.

Nothing of the search is stored. Optuna's study is in memory, its sampler is seeded, and the same trials have the same
outcomes. So a restarted search gets the same suggestions and finds the earlier trials in their folders.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cache_tools.errors import RecipeError
from train.runs.folder import RECIPE, STOPPED
from train.runs.metrics import read_metrics
from train.runs.outcome import last_value
from train.runs.result import load_result
from train.sweep.recipe import SweepRecipe, Trial, make_trial
from train.sweep.search_recipe import figure_text, larger_is_better
from train.sweep.suggest import Outcome, Suggestions
from train.weights.run_files import has_file


class Best(NamedTuple):
    """The best finished trial of a search, and the command that trains its settings again with other seeds."""

    trial: str
    metric: str
    value: float
    command: str


class SearchResult(NamedTuple):
    """The trials of a search, each once, in the order of their suggestion; the best one, if any finished."""

    trials: list[Trial]
    best: Best | None


Train = Callable[[Sequence[Trial], Sequence[Trial]], None]
"""Trains new trials, given those and the earlier ones. Afterwards each has a result or a failure in its folder."""


def run_search(
    sweep: SweepRecipe, folder: Path, train: Train, say: Callable[[str], None] = lambda text: None
) -> SearchResult:
    """Ask for trials, train them and report their outcomes, in rounds, until there are enough.

    Args:
        folder: of the sweep.
        say: receives one line per round.
    """
    search = sweep.search
    assert search is not None, "only a sweep with a search is searched"
    suggestions = Suggestions(search, sweep.space())
    trials: dict[str, Trial] = {}
    best: Best | None = None
    while len(suggestions) < search.trials:
        first, earlier = len(suggestions), list(trials.values())
        count = min(search.together, search.trials - first)
        suggested = [_trial_of(sweep, suggestions.ask(), folder, trials) for _ in range(count)]
        train(list(trials.values())[len(earlier) :], earlier)
        for number, trial in enumerate(suggested, start=first):
            outcome = read_outcome(trial, search.metric)
            suggestions.tell(number, outcome)
            best = _better(best, trial, outcome, search.metric, folder)
        so_far = ""
        if best is not None:
            so_far = f", best {best.metric} so far {figure_text(best.metric, best.value)}: {best.trial}"
        say(f"{len(suggestions)} of {search.trials} suggestions, {len(trials)} different{so_far}")
    return SearchResult(list(trials.values()), best)


def read_outcome(trial: Trial, metric: str) -> Outcome:
    """The outcome of a trial, from its folder."""
    finished = load_result(trial.folder) is not None
    history = read_metrics(trial.folder) if finished or has_file(trial.folder / STOPPED) else None
    if history is None:
        return Outcome("failed", None, 0)
    return Outcome("finished" if finished else "stopped", last_value(history, metric, "search.metric"), len(history))


def _trial_of(sweep: SweepRecipe, chosen: Mapping[str, Any], folder: Path, trials: dict[str, Trial]) -> Trial:
    """The trial of these settings in `trials`; a new one is added."""
    new = make_trial(sweep, {**chosen, "seed": sweep.seed_numbers[0]}, folder, len(trials))
    trial = trials.setdefault(json.dumps(new.recipe.values(), sort_keys=True), new)
    if trial is new and any(other.name == new.name for other in trials.values() if other is not new):
        raise RecipeError("two trials of the search have the same name", where=new.name)
    return trial


def _better(best: Best | None, trial: Trial, outcome: Outcome, metric: str, folder: Path) -> Best | None:
    """The trial if it finished and is better than the best so far, else the best so far."""
    value = outcome.value
    if outcome.status != "finished" or value is None:
        return best
    if best is not None and (value <= best.value if larger_is_better(metric) else value >= best.value):
        return best
    words = ["sweep-students", f"{trial.folder / RECIPE}", "--set", f"seed={trial.recipe.seed + 1}"]
    return Best(trial.name, metric, value, shlex.join([*words, "--seeds", "5", "--out", f"{folder}-best"]))
