"""How a trial of a sweep ended where it has no result: it failed, or was stopped for being worse than others."""

from __future__ import annotations

import math
from pathlib import Path

import polars as pl

from cache_tools.config import Frozen
from cache_tools.errors import RecipeError
from cache_tools.files import put_durably
from train.runs.folder import FAILED, STOPPED
from train.runs.result import load_result


class Failure(Frozen):
    """Why a trial has no result; `failed.json` in its folder. Remove that file to have it tried again."""

    kind: str
    message: str

    def save(self, folder: Path) -> None:
        put_durably(folder / FAILED, self.model_dump_json(indent=2).encode())


def load_failure(folder: Path) -> Failure | None:
    """What stopped a trial, None if nothing did."""
    try:
        return Failure.model_validate_json((folder / FAILED).read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def settled(folder: Path) -> bool:
    """Whether nothing is left to do for the trial of a folder: it finished, failed or was stopped."""
    return load_result(folder) is not None or load_failure(folder) is not None or (folder / STOPPED).exists()


def last_value(history: pl.DataFrame, metric: str, where: str) -> float | None:
    """A metric as it was measured last in a run's epochs; None if it was not yet, or if it is no number.

    Raises:
        RecipeError: the metric, which `where` names, is none of the run's figures.
    """
    if metric not in history.columns:
        numbers = [name for name, dtype in history.schema.items() if dtype.is_numeric()]
        raise RecipeError("no such metric", where=where, expected=", ".join(numbers), found=metric)
    values = history[metric].drop_nulls()
    value = float(values[-1]) if len(values) else math.nan
    return None if math.isnan(value) else value
