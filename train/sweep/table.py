"""The results of a sweep as tables: a row per trial, and means over seeds with Pareto fronts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

import polars as pl

from train.cost import Cost
from train.evaluate.multilabel import headline_of
from train.report.gains import Paired, gains, pairing
from train.report.records import FIGURE_ON
from train.report.spread import interval_factor, pareto_front
from train.report.trials import COLUMNS, FIGURES, further_splits, setting_columns
from train.runs.folder import STOPPED, flatten, stored_identity
from train.runs.metrics import epochs_logged
from train.runs.outcome import load_failure
from train.runs.result import load_result
from train.sweep.recipe import Trial
from train.weights.run_files import has_file

COSTS = ("parameters", "flops", "latency_1_ms", "latency_128_ms")
STD_ON, INTERVAL_ON = "std on ", "ci95 on "  # of the figure on a further test split


def trials_table(trials: Sequence[Trial], costs: dict[str, Cost]) -> pl.DataFrame:
    """One row per trial, read from the trials' folders.

    Columns: `trial`, `student`, `loss`, `seed`, one per other setting; `status` (`finished`, `failed`, `stopped`,
    `waiting`), `error`; figures of the last epoch on the test split (null unless finished), costs, and the `command`
    that trains the trial alone. `figure on SPLIT` is the top1 (with several labels the mAP) on a further test split,
    after the first, `test_split`. `gain` is top1 minus that of the same student on labels alone with the same seed,
    null where the sweep has no such trial.

    Args:
        costs: by student.
    """
    rows = [_row(trial, costs.get(trial.recipe.student)) for trial in trials]
    for row, gain in zip(rows, gains([_pairing(*each) for each in zip(trials, rows, strict=True)]), strict=True):
        row["gain"] = gain
    table = pl.DataFrame(rows, infer_schema_length=None)
    types = {**COLUMNS, **{f"{FIGURE_ON}{split}": pl.Float64 for split in further_splits(table)}}
    typed = table.with_columns(pl.col(name).cast(dtype) for name, dtype in types.items())
    return typed.select(*COLUMNS, *(name for name in typed.columns if name not in COLUMNS))


def over_seeds(table: pl.DataFrame) -> pl.DataFrame:
    """One row per setting over its finished trials: n, mean, standard deviation and half the 95 % interval.

    The interval is Student's t over seeds; null for a single seed. `gain` is the mean over the `gain_n` seeds that were
    also trained on labels alone. `std on SPLIT` and `ci95 on SPLIT` belong to `figure on SPLIT`. `pareto_COST` is true
    if no other setting has at least the same top-1 (with several labels: mAP) at a lower cost. The best comes first.
    """
    finished = table.filter(pl.col("status") == "finished")
    keys = setting_columns(table)
    missing = {"gain", *FIGURES} - {*finished.columns}  # from a table of an earlier version
    finished = finished.with_columns(**{name: pl.lit(None, pl.Float64) for name in sorted(missing)})
    figures = ("top1", "gain", *FIGURES[1:])
    means = [pl.col(name).mean().alias(name) for name in figures]
    spread = [pl.col(name).std().alias(f"{name}_std") for name in figures]
    costs = [pl.col(name).first() for name in COSTS]
    splits = further_splits(table)
    for split in splits:
        figure = pl.col(f"{FIGURE_ON}{split}")
        means += [figure.mean(), figure.count().alias(f"_count on {split}")]
        spread += [figure.std().alias(f"{STD_ON}{split}")]
    groups = finished.group_by(keys, maintain_order=True).agg(
        pl.len().alias("n"), pl.col("gain").count().alias("gain_n"), *means, *spread, *costs, pl.col("train_s").mean()
    )
    groups = groups.with_columns(_factors(groups["n"], "_factor"), _factors(groups["gain_n"], "_gain_factor"))
    groups = groups.with_columns(
        (pl.col(f"{name}_std") * pl.col("_gain_factor" if name == "gain" else "_factor")).alias(f"{name}_ci95")
        for name in figures
    )
    for split in splits:
        factor = _factors(groups[f"_count on {split}"], "_")
        groups = groups.with_columns((groups[f"{STD_ON}{split}"] * factor).alias(f"{INTERVAL_ON}{split}"))
    headline = headline_column(groups)
    compared = groups[headline].to_list()
    fronts = [
        pl.Series(f"pareto_{cost}", pareto_front(groups[cost].to_list(), compared), dtype=pl.Boolean) for cost in COSTS
    ]
    return (
        groups.drop("_factor", "_gain_factor", *(f"_count on {split}" for split in splits))
        .with_columns(fronts)
        .sort(headline, descending=True, nulls_last=True)
    )


def headline_column(table: pl.DataFrame) -> str:
    """The column by which trials are compared: the mAP if they have one, else the top-1."""
    return headline_of("map" in table.columns and table["map"].null_count() < len(table))


def _factors(counts: pl.Series, name: str) -> pl.Series:
    """Half the 95 % interval of the mean of so many values, in standard deviations; null for fewer than two."""
    return pl.Series(name, [interval_factor(n) if n > 1 else None for n in counts.to_list()], dtype=pl.Float64)


def _pairing(trial: Trial, row: dict[str, Any]) -> Paired:
    identity = stored_identity(trial.folder)
    recipe = trial.recipe.values() if identity is None else identity["recipe"]
    return pairing(
        {key: value for key, value in flatten(recipe).items() if key != "seed"},
        {} if identity is None else identity["data"],
        seed=trial.recipe.seed,
        on_labels=not trial.recipe.loss.needs_targets,
        figure=row["top1"] if row["map"] is None else row["map"],
    )


def _row(trial: Trial, cost: Cost | None) -> dict[str, Any]:
    folder = trial.folder
    result, failure = load_result(folder), load_failure(folder)
    status = "finished" if result else "failed" if failure else "stopped" if has_file(folder / STOPPED) else "waiting"
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"trial": trial.name, "student": trial.recipe.student, "loss": trial.loss, "seed": trial.recipe.seed}
    row |= {"status": status, "error": failure.message if failure else None, "folder": str(folder)}
    row |= {"command": shlex.join(["train-student", str(folder / "recipe.yaml"), "--out", f"{folder}-alone"])}
    if cost is not None:
        row |= {"parameters": cost.parameters, "flops": cost.flops}
        row |= {f"latency_{size}_ms": cost.latency_ms(size) for size in (1, 128)}
    if result is not None:
        row |= {"epochs_done": result.epochs, "train_s": result.train_s, "parameters": result.parameters}
        row |= {name: getattr(result.last, name, None) for name in FIGURES}
        row |= {"best_epoch": None if result.best_epoch is None else result.best_epoch + 1}
        row |= {
            f"{FIGURE_ON}{split}": getattr(more.last, "headline", None) for split, more in result.more_tests.items()
        }
        row |= {"test_split": result.test_split}
        row |= {"best_top1": getattr(result.best, "top1", None), "best_map": getattr(result.best, "map", None)}
    elif epochs := epochs_logged(folder):
        row |= {"epochs_done": epochs}
    for key, value in trial.settings.items():
        if key not in {"student", "loss", "seed"}:
            row[key] = value if isinstance(value, int | float | str | bool) else json.dumps(value)
    return row
