"""Search for hyper-parameters: ask Optuna for a few trials, train them side by side, tell what they came to.

Nothing of it is stored. The study is in memory, its sampler is seeded and the same trials come to the same values, so
a search that is started again asks for the same trials and finds those of before in their folders.
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
from train.sweep.search_recipe import larger_is_better
from train.sweep.suggest import Outcome, Suggestions


class Best(NamedTuple):
    """The best finished trial of a search, and the command that trains its settings again with other seeds."""

    trial: str
    metric: str
    value: float
    command: str


class Found(NamedTuple):
    """All trials of a search, each once, in the order in which they were suggested; the best, if one finished."""

    trials: list[Trial]
    best: Best | None


Train = Callable[[Sequence[Trial], Sequence[Trial]], None]
"""Is given new trials and those of before; afterwards each has a result, or why not, in its folder."""


def run_search(sweep: SweepRecipe, folder: Path, train: Train, say: Callable[[str], None] = lambda text: None) -> Found:
    """Ask for trials, have them trained, tell what they came to, until there are enough.

    Args:
        folder: of the sweep.
        say: receives one line per round.
    """
    search = sweep.search
    assert search is not None, "asked for"
    suggestions = Suggestions(search, sweep.space())
    trials: dict[str, Trial] = {}
    best: Best | None = None
    while len(suggestions) < search.trials:
        first, before = len(suggestions), list(trials.values())
        count = min(search.together, search.trials - first)
        asked = [_known(sweep, suggestions.ask(), folder, trials) for _ in range(count)]
        train(list(trials.values())[len(before) :], before)
        for number, trial in enumerate(asked, start=first):
            came_to = outcome(trial, search.metric)
            suggestions.tell(number, came_to)
            best = _better(best, trial, came_to, search.metric, folder)
        so_far = "" if best is None else f", best {best.metric} so far {best.value:.4f}: {best.trial}"
        say(f"{len(suggestions)} of {search.trials} suggestions, {len(trials)} different{so_far}")
    return Found(list(trials.values()), best)


def outcome(trial: Trial, metric: str) -> Outcome:
    """What a trial's folder says that it came to."""
    finished = load_result(trial.folder) is not None
    history = read_metrics(trial.folder) if finished or (trial.folder / STOPPED).exists() else None
    if history is None:
        return Outcome("failed", None, 0)
    return Outcome("finished" if finished else "stopped", last_value(history, metric, "search.metric"), len(history))


def _known(sweep: SweepRecipe, chosen: Mapping[str, Any], folder: Path, trials: dict[str, Trial]) -> Trial:
    """The trial of these settings: the one that is in `trials` already, or a new one, put there."""
    trial = make_trial(sweep, {**chosen, "seed": sweep.seed_numbers[0]}, folder, len(trials))
    known = trials.setdefault(json.dumps(trial.recipe.values(), sort_keys=True), trial)
    if known is trial and any(other.name == trial.name for other in trials.values() if other is not trial):
        raise RecipeError("two trials of the search have the same name", where=trial.name)
    return known


def _better(best: Best | None, trial: Trial, came_to: Outcome, metric: str, folder: Path) -> Best | None:
    """The trial, if it finished and is better than the best of before."""
    value = came_to.value
    if came_to.status != "finished" or value is None:
        return best
    if best is not None and (value <= best.value if larger_is_better(metric) else value >= best.value):
        return best
    words = ["sweep-students", f"{trial.folder / RECIPE}", "--set", f"seed={trial.recipe.seed + 1}"]
    return Best(trial.name, metric, value, shlex.join([*words, "--seeds", "5", "--out", f"{folder}-best"]))
