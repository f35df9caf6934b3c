"""Trials of a sweep that ended without a result: failed, or stopped because others were better."""

from __future__ import annotations

import math
from pathlib import Path

import polars as pl

from cache_tools.config import Frozen
from cache_tools.errors import RecipeError
from train.runs.folder import FAILED, STOPPED
from train.runs.result import load_result
from train.weights.run_files import has_file, read_file, write_file


class Failure(Frozen):
    """Why a trial failed, stored as `failed.json` in its folder. Without that file the trial is tried again.

    Attributes:
        kind: `diverged`, `memory`, `died` or `error`.
    """

    kind: str
    message: str

    def save(self, folder: Path) -> None:
        write_file(folder / FAILED, self.model_dump_json(indent=2).encode())


def load_failure(folder: Path) -> Failure | None:
    """The failure of a trial; None if it did not fail."""
    data = read_file(folder / FAILED)
    try:
        return None if data is None else Failure.model_validate_json(data)
    except ValueError:
        return None


def is_settled(folder: Path) -> bool:
    """Whether a trial has ended: it finished, failed or was stopped."""
    return load_result(folder) is not None or load_failure(folder) is not None or has_file(folder / STOPPED)


def last_value(history: pl.DataFrame, metric: str, where: str) -> float | None:
    """The last measured value of a metric; None before the first measurement, and for NaN.

    Args:
        where: the setting that names the metric, for the error.

    Raises:
        RecipeError: the run has no such metric.
    """
    if metric not in history.columns:
        numbers = [name for name, dtype in history.schema.items() if dtype.is_numeric()]
        raise RecipeError("no such metric", where=where, expected=", ".join(numbers), found=metric)
    values = history[metric].drop_nulls()
    value = float(values[-1]) if len(values) else math.nan
    return None if math.isnan(value) else value
