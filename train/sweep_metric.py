"""The figure that decides between trials of a sweep: whether they will have it is known before they are trained."""

from __future__ import annotations

from collections.abc import Sequence

from cache_tools.dataset import DatasetRecipe
from cache_tools.errors import RecipeError
from cache_tools.reader import TeacherCache
from train.sweep_recipe import Trial

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
