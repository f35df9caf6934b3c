"""Folders of a sweep's trials: a run of other settings, or from another cache, is not taken for the trial."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cache_tools.errors import RecipeError
from cache_tools.reader import TeacherCache
from train.data import cache_identity
from train.folder import FAILED, differences, forget, stored_identity, worth_keeping
from train.halving import Asha, forget_other_contests
from train.outcome import settled
from train.sweep_recipe import Trial

NAMED = 3  # trials in an error


def reopen(trials: Sequence[Trial], asha: Asha | None, *, retry_failed: bool = False, overwrite: bool = False) -> None:
    """Let those go on that are to be tried again.

    Args:
        asha: rules of the contest; trials that others stopped go on.
        retry_failed: forget failures.
        overwrite: forget runs of other settings, or from another cache.

    Raises:
        RecipeError: there are such runs, and they are not to be forgotten.
    """
    kept = [trial for trial in trials if worth_keeping(trial.folder) or (not retry_failed and settled(trial.folder))]
    other = _other_runs(kept)
    if other and not overwrite:
        told = [f"{trial.name}: {', '.join(found)}" for trial, found in other[:NAMED]]
        more = [f"and {len(other) - NAMED} more trials"] if len(other) > NAMED else []
        raise RecipeError(
            "other runs are stored in the folders of the trials",
            where=other[0][0].folder.parent,
            expected="the same settings and data",
            found="; ".join(told + more),
            next_step="choose another --out, or train these trials again with --overwrite",
        )
    for trial, _ in other:
        forget(trial.folder)
    forget_other_contests(trials, asha)
    if retry_failed:
        for trial in trials:
            (trial.folder / FAILED).unlink(missing_ok=True)


def _other_runs(trials: Sequence[Trial]) -> list[tuple[Trial, list[str]]]:
    """Trials in whose folders is something else, with what they do not have in common."""
    caches: dict[str, TeacherCache] = {}
    found = []
    for trial in trials:
        stored = stored_identity(trial.folder)
        wanted = {"recipe": json.loads(json.dumps(trial.recipe.values())), "data": _data(trial, stored, caches)}
        if different := differences(stored, wanted):
            found.append((trial, different))
    return found


def _data(trial: Trial, stored: dict[str, Any] | None, caches: dict[str, TeacherCache]) -> Any:
    """What tells the data of a trial apart; what is stored where it takes the images themselves to know."""
    recipe = trial.recipe
    if not recipe.loss.needs_targets:
        return None if stored is None else stored["data"]
    assert recipe.cache is not None, "a recipe with targets has a cache"
    if recipe.cache not in caches:
        caches[recipe.cache] = TeacherCache.open(recipe.cache)
    return cache_identity(caches[recipe.cache], recipe)
