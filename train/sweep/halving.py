"""Asynchronous successive halving: which trials of a sweep stop at a rung.

A decision reads the metrics in the run folders of all trials and writes `stopped.json` into the folders of those that
stop. Nothing else is stored, so processes and machines need not talk to each other, and a sweep that was killed makes
the missing decisions when it resumes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from cache_tools.config import Frozen
from cache_tools.errors import RecipeError
from cache_tools.format.manifest import Manifest
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.reader import TeacherCache
from train.evaluate.metrics import Evaluation
from train.evaluate.multilabel import MultiLabelEvaluation
from train.runs.folder import STOPPED
from train.runs.metrics import read_metrics
from train.runs.outcome import last_value
from train.sweep.recipe import Asha, Trial
from train.weights.run_files import has_file, read_json, remove_file, write_file

# Metrics of the test split start with one of these; `ema_` are those of the averaged weights.
TEST_PREFIXES = ("test_", "ema_")


class Halving(Frozen):
    """Successive halving over the trials of one sweep, whichever process trains them.

    Attributes:
        folders: run folders of all trials that are compared.
        epochs: of the longest trial.
    """

    asha: Asha
    folders: tuple[Path, ...]
    epochs: int

    @classmethod
    def of_trials(cls, trials: Sequence[Trial], asha: Asha) -> Halving:
        """Halving over these trials.

        Raises:
            RecipeError: a trial has no test figures at the first rung, or none at all.
            NotFoundError, FormatError: no such cache, or a damaged one.
        """
        check_metric(asha.metric, trials, "asha")
        for trial in trials:
            first_evaluation = min(trial.recipe.evaluate_every, trial.recipe.epochs)
            if asha.metric.startswith(TEST_PREFIXES) and asha.first_epochs < first_evaluation:
                raise RecipeError(
                    f"no {asha.metric} by epoch {asha.first_epochs}",
                    where=f"{trial.name}: evaluate_every={trial.recipe.evaluate_every}",
                    next_step="evaluate more often (--set evaluate_every=1), or start later (asha: {first_epochs: …})",
                )
        return cls(
            asha=asha,
            folders=tuple(trial.folder for trial in trials),
            epochs=max(trial.recipe.epochs for trial in trials),
        )

    def stop(self, epochs: int, folders: Sequence[Path]) -> set[Path]:
        """Stop the trials that are not among the best 1/η of all that have reached a rung so far.

        Args:
            epochs: number of finished epochs. Nothing stops unless this is a rung.
            folders: run folders of the trials that have just finished this epoch.

        Returns:
            The folders of the trials that stop.

        Raises:
            RecipeError: no such metric, or it was not measured.
            DataError: damaged metrics of a run.
        """
        if epochs not in self.asha.rungs(self.epochs):
            return set()
        scores = {folder: score for folder in self.folders if (score := self._score(folder, epochs)) is not None}
        ranked = sorted(scores, key=lambda folder: scores[folder], reverse=True)
        stopped = set(ranked[math.ceil(len(ranked) / self.asha.keep_one_in) :]) & set(folders)
        for folder in stopped:
            value = self._sign * scores[folder]
            decision = {**self.asha.model_dump(), "epochs": epochs, "value": value, "of": len(ranked)}
            write_file(folder / STOPPED, json.dumps(decision, indent=2).encode())
        return stopped

    @property
    def _sign(self) -> float:
        return 1.0 if self.asha.larger_is_better else -1.0

    def _score(self, folder: Path, epochs: int) -> float | None:
        """The metric at the last evaluation up to this epoch, signed so that larger is better; None before it."""
        metrics = read_metrics(folder)
        if metrics is None or len(metrics) < epochs:
            return None
        history = metrics.head(epochs)
        value = last_value(history, self.asha.metric, "asha.metric")
        if value is None and history[self.asha.metric].null_count() == epochs:  # such as the top-5 of five classes
            raise RecipeError(
                f"no {self.asha.metric} by epoch {epochs}",
                where=folder,
                next_step="choose another metric (asha: {metric: …} in the sweep file)",
            )
        return -math.inf if value is None else self._sign * value


def check_metric(metric: str, trials: Sequence[Trial], section: str) -> None:
    """Check that every trial will have the metric that decides between trials.

    Args:
        section: part of the sweep that names the metric: `asha` or `search`.

    Raises:
        RecipeError: a test metric for a trial without a test split, or a metric of averaged weights without averaging.
        NotFoundError, FormatError: no such cache, or a damaged one.
    """
    if not metric.startswith(TEST_PREFIXES):
        return
    figure = metric.partition("_")[2]
    for trial in trials:
        kind = MultiLabelEvaluation if trial.recipe.loss.multi_label else Evaluation
        if figure in {*Evaluation.model_fields, *MultiLabelEvaluation.model_fields} - {*kind.model_fields}:
            labels = "any number of labels" if trial.recipe.loss.multi_label else "one label"
            raise RecipeError(
                f"no {metric} for images with {labels} each",
                where=trial.name,
                expected=", ".join(f"test_{name}" for name in kind.model_fields if name != "n"),
                next_step=f"choose another metric ({section}: {{metric: …}} in the sweep file)",
            )
    manifests: dict[str, Manifest] = {}
    for trial in trials:
        if metric.startswith("ema_") and trial.recipe.ema_decay is None:
            raise RecipeError(
                f"no {metric} without averaged weights",
                where=trial.name,
                expected="ema_decay",
                next_step=f"set ema_decay=0.999, or choose another metric ({section}: {{metric: …}} in the sweep file)",
            )
        dataset = dataset_of(trial, manifests)
        if dataset.test_split is None:
            raise RecipeError(
                f"no {metric} without a test split",
                where=trial.name,
                expected="a dataset with a test_split",
                found=f"{dataset.name} without one",
                next_step=f"choose a metric of training ({section}: {{metric: loss}} in the sweep file)",
            )


def resume_stopped(trials: Sequence[Trial], asha: Asha | None) -> None:
    """Let trials continue that were stopped by other rules than these; None lets all of them continue."""
    rules = None if asha is None else asha.model_dump()
    for trial in trials:
        file = trial.folder / STOPPED
        try:
            decision = read_json(file)
            if decision is None and not has_file(file):
                continue
            same_rules = rules is not None and all(decision.get(key) == value for key, value in rules.items())
        except (ValueError, AttributeError):
            same_rules = False
        if not same_rules:
            remove_file(file)


def dataset_of(trial: Trial, manifests: dict[str, Manifest]) -> DatasetRecipe:
    """The dataset of a trial; `manifests` keeps those of caches, so that each cache is opened once."""
    recipe = trial.recipe
    if not recipe.loss.needs_targets:
        return recipe.own_dataset()
    assert recipe.cache is not None, "a recipe with targets has a cache"
    if recipe.cache not in manifests:
        manifests[recipe.cache] = TeacherCache.open(recipe.cache).manifest
    return recipe.cached_dataset(manifests[recipe.cache])
