"""Asynchronous successive halving: which trials of a sweep stop at a rung, from what is in the folders of all.

Nothing is kept but the runs' own metrics and a `stopped.json` in the folders of those that were stopped, so processes
and machines need not talk to each other, and a sweep that was killed judges again what it had not judged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from cache_tools.config import Frozen
from cache_tools.errors import RecipeError
from cache_tools.files import put_durably
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.reader import TeacherCache
from train.runs.folder import STOPPED
from train.runs.metrics import read_metrics
from train.runs.outcome import last_value
from train.sweep.recipe import Asha, Trial


class Contest(Frozen):
    """The trials that compete, wherever they are trained.

    Attributes:
        folders: of all of them.
        epochs: of the longest.
    """

    asha: Asha
    folders: tuple[Path, ...]
    epochs: int

    @classmethod
    def among(cls, trials: Sequence[Trial], asha: Asha) -> Contest:
        """The contest of a sweep's trials.

        Raises:
            RecipeError: a trial has no test figures at the first rung, or none at all.
            NotFoundError, FormatError: no such cache, or a damaged one.
        """
        check_metric(asha.metric, trials, "asha")
        for trial in trials:
            measured = asha.metric.startswith(MEASURED)
            if measured and asha.first_epochs < min(trial.recipe.evaluate_every, trial.recipe.epochs):
                raise RecipeError(
                    f"no {asha.metric} by epoch {asha.first_epochs}",
                    where=f"{trial.name}: evaluate_every={trial.recipe.evaluate_every}",
                    next_step="evaluate more often (--set evaluate_every=1), or begin later (asha: {first_epochs: …})",
                )
        return cls(
            asha=asha,
            folders=tuple(trial.folder for trial in trials),
            epochs=max(trial.recipe.epochs for trial in trials),
        )

    def stop(self, rung: int, standing: Sequence[Path]) -> set[Path]:
        """Stop those that are not among the best 1/η of all that have reached a rung so far.

        Args:
            rung: finished epochs; anything that is no rung stops nobody.
            standing: folders of the trials that have just finished this epoch.

        Raises:
            RecipeError: the metric is none of the runs' figures, or was not measured.
            DataError: damaged metrics of a run.
        """
        if rung not in self.asha.rungs(self.epochs):
            return set()
        scores = {folder: score for folder in self.folders if (score := self._score(folder, rung)) is not None}
        ranked = sorted(scores, key=lambda folder: scores[folder], reverse=True)
        worse = set(ranked[math.ceil(len(ranked) / self.asha.keep_one_in) :]) & set(standing)
        for folder in worse:
            told = {**self.asha.model_dump(), "epochs": rung, "value": self._sign * scores[folder], "of": len(ranked)}
            put_durably(folder / STOPPED, json.dumps(told, indent=2).encode())
        return worse

    @property
    def _sign(self) -> float:
        return 1.0 if self.asha.larger_is_better else -1.0

    def _score(self, folder: Path, rung: int) -> float | None:
        """The metric at the last evaluated epoch up to the rung, larger is better; None before the rung."""
        metrics = read_metrics(folder)
        if metrics is None or len(metrics) < rung:
            return None
        history = metrics.head(rung)
        value = last_value(history, self.asha.metric, "asha.metric")
        if value is None and history[self.asha.metric].null_count() == rung:  # such as the top-5 of five classes
            raise RecipeError(
                f"no {self.asha.metric} by epoch {rung}",
                where=folder,
                next_step="take another figure (asha: {metric: …} in the sweep file)",
            )
        return -math.inf if value is None else self._sign * value


def forget_other_contests(trials: Sequence[Trial], asha: Asha | None) -> None:
    """Let trials go on that were stopped in a contest with other rules, or in one where there is none any more."""
    rules = None if asha is None else asha.model_dump()
    for trial in trials:
        file = trial.folder / STOPPED
        try:
            told = json.loads(file.read_bytes())
            same = rules is not None and all(told.get(key) == value for key, value in rules.items())
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError):
            same = False
        if not same:
            file.unlink(missing_ok=True)


MEASURED = ("test_", "ema_")  # figures of the test split begin so; the second are those of the averaged weights


def check_metric(metric: str, trials: Sequence[Trial], where: str) -> None:
    """See to it that trials will have the figure that decides between them.

    Args:
        where: the metric is chosen: `asha` or `search`.

    Raises:
        RecipeError: a figure of the test split for a trial without one, or of averaged weights where none are kept.
        NotFoundError, FormatError: no such cache, or a damaged one.
    """
    if not metric.startswith(MEASURED):
        return
    datasets: dict[str, DatasetRecipe] = {}
    for trial in trials:
        if metric.startswith("ema_") and trial.recipe.ema_decay is None:
            raise RecipeError(
                f"no {metric} without averaged weights",
                where=trial.name,
                expected="ema_decay",
                next_step=f"--set ema_decay=0.999, or take another figure ({where}: {{metric: …}} in the sweep file)",
            )
        dataset = _dataset(trial, datasets)
        if dataset.test_split is None:
            raise RecipeError(
                f"no {metric} without a test split",
                where=trial.name,
                expected="a dataset with a test_split",
                found=f"{dataset.name} without one",
                next_step=f"take a figure of training ({where}: {{metric: loss}} in the sweep file)",
            )


def _dataset(trial: Trial, known: dict[str, DatasetRecipe]) -> DatasetRecipe:
    """What a trial learns from; a cache is opened once."""
    recipe = trial.recipe
    if not recipe.loss.needs_targets:
        assert recipe.dataset is not None, "a recipe without targets has a dataset"
        return recipe.dataset
    assert recipe.cache is not None, "a recipe with targets has a cache"
    if recipe.cache not in known:
        known[recipe.cache] = TeacherCache.open(recipe.cache).manifest.dataset
    return known[recipe.cache]
