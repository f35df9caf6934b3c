"""A sweep's results on the terminal."""

from __future__ import annotations

from typing import Any

import polars as pl

from train.report.comparison import short_names
from train.report.trials import setting_columns
from train.sweep.recipe import SweepRecipe
from train.sweep.run import SweepResult


def sweep_text(result: SweepResult, sweep: SweepRecipe) -> str:
    """The table of settings, the best first, then the trials that did not finish."""
    parts = []
    if not result.settings.is_empty():
        with pl.Config(
            tbl_rows=-1, tbl_cols=-1, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True,
            tbl_formatting="NOTHING", fmt_str_lengths=60, tbl_width_chars=200,
        ):  # fmt: skip
            parts.append(str(_table(result.settings)))
        seeds = int(result.settings["n"].max())  # type: ignore[arg-type]
        if (note := _note_on_figures(sweep, seeds)) is not None:
            parts.append(note)
        parts.append(
            "front: on the Pareto front of top-1 and parameters (p), FLOPs (f), latency of one image (1) or of 128 (b)."
        )
    if result.best is not None:
        best = result.best
        parts.append(
            f"Best {best.metric} of the search: {best.value:.4f}, {best.trial}. It was chosen for this figure; "
            f"to report it, train it with other seeds:\n  {best.command}"
        )
    for status in ("failed", "stopped"):
        reasons: dict[str, list[str]] = {}
        for row in result.trials.filter(pl.col("status") == status).iter_rows(named=True):
            reasons.setdefault(row["error"] or f"after {row['epochs_done']} epochs", []).append(row["trial"])
        parts += [f"{status}: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    parts.append(f"Everything is in {result.folder}")
    return "\n".join(parts)


def _note_on_figures(sweep: SweepRecipe, seeds: int) -> str | None:
    """A note on how far the figures can be trusted."""
    if sweep.asha is not None:
        return "Successive halving stopped trials early: use these figures to choose settings, not to report them."
    if sweep.search is not None:
        return None  # the line about the best trial has this warning
    if seeds > 1:
        return "Mean ± standard deviation over seeds; 95 % is half of the interval of the mean (Student's t)."
    return "One seed: differences may be chance. Use --seeds 3 to see how much figures vary."


def _table(settings: pl.DataFrame) -> pl.DataFrame:
    names = short_names([key for key in setting_columns(settings) if _is_setting(key)])
    return pl.DataFrame([_cells(row, names) for row in settings.iter_rows(named=True)])


def _cells(row: dict[str, Any], names: dict[str, str]) -> dict[str, str]:
    cells = {name: "" if row[key] is None else str(row[key]) for key, name in names.items()}
    cells |= {"n": str(row["n"]), "top-1": _spread(row, "top1", 100), "95 %": _half_interval(row)}
    cells |= {"NLL": _spread(row, "nll", 1, digits=4), "ECE": _spread(row, "ece", 100)}
    cells |= {"params": _count(row["parameters"]), "FLOPs": _count(row["flops"])}
    cells |= {"ms, 1": _ms(row["latency_1_ms"]), "ms, 128": _ms(row["latency_128_ms"])}
    marks = {"p": "parameters", "f": "flops", "1": "latency_1_ms", "b": "latency_128_ms"}
    return cells | {"front": "".join(mark for mark, cost in marks.items() if row[f"pareto_{cost}"])}


def _is_setting(key: str) -> bool:
    """Whether a column of `over_seeds` is a setting."""
    return key != "n" and not key.endswith(("_std", "_ci95")) and not key.startswith("pareto_")


def _spread(row: dict[str, Any], name: str, factor: float, digits: int = 2) -> str:
    if row[name] is None:
        return "–"
    spread = "" if row[f"{name}_std"] is None else f" ± {factor * row[f'{name}_std']:.{digits}f}"
    return f"{factor * row[name]:.{digits}f}{spread}"


def _half_interval(row: dict[str, Any]) -> str:
    return "–" if row["top1_ci95"] is None else f"±{100 * row['top1_ci95']:.2f}"


def _count(number: int | None) -> str:
    if number is None:
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
