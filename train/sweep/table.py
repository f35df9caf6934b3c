"""The results of a sweep as tables: a row per trial, and means over seeds with Pareto fronts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

import polars as pl

from train.cost import Cost
from train.report.spread import interval_factor, pareto_front
from train.report.trials import COLUMNS, FIGURES, setting_columns
from train.runs.folder import STOPPED
from train.runs.metrics import epochs_logged
from train.runs.outcome import load_failure
from train.runs.result import load_result
from train.sweep.recipe import Trial

COSTS = ("parameters", "flops", "latency_1_ms", "latency_128_ms")


def trials_table(trials: Sequence[Trial], costs: dict[str, Cost]) -> pl.DataFrame:
    """One row per trial, read from the trials' folders.

    Columns: `trial`, `student`, `loss`, `seed`, one per other setting; `status` (`finished`, `failed`, `stopped`,
    `waiting`), `error`; figures of the last epoch on the test split (null unless finished), costs, and the `command`
    that trains the trial alone.

    Args:
        costs: by student.
    """
    rows = [_row(trial, costs.get(trial.recipe.student)) for trial in trials]
    table = pl.DataFrame(rows, infer_schema_length=None)
    typed = table.with_columns(pl.col(name).cast(dtype) for name, dtype in COLUMNS.items())
    return typed.select(*COLUMNS, *(name for name in typed.columns if name not in COLUMNS))


def over_seeds(table: pl.DataFrame) -> pl.DataFrame:
    """One row per setting over its finished trials: n, mean, standard deviation and half the 95 % interval.

    The interval is Student's t over seeds; null for a single seed. `pareto_COST` is true if no other setting has at
    least the same top-1 at a lower cost. The best top-1 comes first.
    """
    finished = table.filter(pl.col("status") == "finished")
    keys = setting_columns(table)
    means = [pl.col(name).mean().alias(name) for name in FIGURES]
    spread = [pl.col(name).std().alias(f"{name}_std") for name in FIGURES]
    costs = [pl.col(name).first() for name in COSTS]
    groups = finished.group_by(keys, maintain_order=True).agg(
        pl.len().alias("n"), *means, *spread, *costs, pl.col("train_s").mean()
    )
    factors = [interval_factor(n) if n > 1 else None for n in groups["n"].to_list()]
    groups = groups.with_columns(pl.Series("_factor", factors, dtype=pl.Float64))
    groups = groups.with_columns((pl.col(f"{name}_std") * pl.col("_factor")).alias(f"{name}_ci95") for name in FIGURES)
    top1 = groups["top1"].to_list()
    fronts = [
        pl.Series(f"pareto_{cost}", pareto_front(groups[cost].to_list(), top1), dtype=pl.Boolean) for cost in COSTS
    ]
    return groups.drop("_factor").with_columns(fronts).sort("top1", descending=True, nulls_last=True)


def _row(trial: Trial, cost: Cost | None) -> dict[str, Any]:
    folder = trial.folder
    result, failure = load_result(folder), load_failure(folder)
    status = "finished" if result else "failed" if failure else "stopped" if (folder / STOPPED).exists() else "waiting"
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"trial": trial.name, "student": trial.recipe.student, "loss": trial.loss, "seed": trial.recipe.seed}
    row |= {"status": status, "error": failure.message if failure else None, "folder": str(folder)}
    row |= {"command": shlex.join(["train-student", str(folder / "recipe.yaml"), "--out", f"{folder}-alone"])}
    if cost is not None:
        row |= {"parameters": cost.parameters, "flops": cost.flops}
        row |= {f"latency_{size}_ms": cost.latency_ms(size) for size in (1, 128)}
    if result is not None:
        row |= {"epochs_done": result.epochs, "train_s": result.train_s, "parameters": result.parameters}
        row |= {name: getattr(result.last, name) if result.last else None for name in FIGURES}
        row |= {"best_epoch": None if result.best_epoch is None else result.best_epoch + 1}
        row |= {"best_top1": result.best.top1 if result.best else None}
    elif epochs := epochs_logged(folder):
        row |= {"epochs_done": epochs}
    for key, value in trial.settings.items():
        if key not in {"student", "loss", "seed"}:
            row[key] = value if isinstance(value, int | float | str | bool) else json.dumps(value)
    return row
