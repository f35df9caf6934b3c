"""A sweep's results on the terminal."""

from __future__ import annotations

from typing import Any

import polars as pl

from train.report.comparison import short_names
from train.report.trials import setting_columns
from train.sweep.recipe import SweepRecipe
from train.sweep.run import SweepResult


def sweep_text(result: SweepResult, sweep: SweepRecipe) -> str:
    """The table of settings, best first, and what did not finish."""
    parts = []
    if not result.settings.is_empty():
        with pl.Config(
            tbl_rows=-1, tbl_cols=-1, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True,
            tbl_formatting="NOTHING", fmt_str_lengths=60, tbl_width_chars=200,
        ):  # fmt: skip
            parts.append(str(_table(result.settings)))
        seeds = int(result.settings["n"].max())  # type: ignore[arg-type]
        if (note := _about_seeds(sweep, seeds)) is not None:
            parts.append(note)
        parts.append(
            "front: no other is at least as good and smaller (p parameters, f FLOPs, 1 and b latency of 1 and 128)."
        )
    if result.best is not None:
        found = result.best
        parts.append(
            f"Best {found.metric} of the search: {found.value:.4f}, {found.trial}. It was chosen for this figure; "
            f"to report it, train it with other seeds:\n  {found.command}"
        )
    for status in ("failed", "stopped"):
        reasons: dict[str, list[str]] = {}
        for row in result.trials.filter(pl.col("status") == status).iter_rows(named=True):
            reasons.setdefault(row["error"] or f"after {row['epochs_done']} epochs", []).append(row["trial"])
        parts += [f"{status}: {', '.join(names)}: {why}" for why, names in reasons.items()]
    parts.append(f"Everything is in {result.folder}")
    return "\n".join(parts)


def _about_seeds(sweep: SweepRecipe, seeds: int) -> str | None:
    """What the figures are good for."""
    if sweep.asha is not None:
        return "Successive halving stopped trials early: these figures are for choosing, not for reporting."
    if sweep.search is not None:
        return None  # told with the best
    if seeds > 1:
        return "Mean ± standard deviation over seeds; 95 % is half of the interval of the mean (Student's t)."
    return "One seed: differences of this size may be chance. --seeds 3 tells."


def _table(settings: pl.DataFrame) -> pl.DataFrame:
    names = short_names([key for key in setting_columns(settings) if _own(key)])
    return pl.DataFrame([_shown(row, names) for row in settings.iter_rows(named=True)])


def _shown(row: dict[str, Any], names: dict[str, str]) -> dict[str, str]:
    shown = {name: "" if row[key] is None else str(row[key]) for key, name in names.items()}
    shown |= {"n": str(row["n"]), "top-1": _spread(row, "top1", 100), "95 %": _half(row)}
    shown |= {"NLL": _spread(row, "nll", 1, digits=4), "ECE": _spread(row, "ece", 100)}
    shown |= {"params": _big(row["parameters"]), "FLOPs": _big(row["flops"])}
    shown |= {"ms, 1": _ms(row["latency_1_ms"]), "ms, 128": _ms(row["latency_128_ms"])}
    marks = {"p": "parameters", "f": "flops", "1": "latency_1_ms", "b": "latency_128_ms"}
    return shown | {"front": "".join(mark for mark, cost in marks.items() if row[f"pareto_{cost}"])}


def _own(key: str) -> bool:
    """Whether a column of `over_seeds` is a setting."""
    made = ("_std", "_ci95")
    return key != "n" and not key.endswith(made) and not key.startswith("pareto_")


def _spread(row: dict[str, Any], name: str, factor: float, digits: int = 2) -> str:
    if row[name] is None:
        return "–"
    spread = "" if row[f"{name}_std"] is None else f" ± {factor * row[f'{name}_std']:.{digits}f}"
    return f"{factor * row[name]:.{digits}f}{spread}"


def _half(row: dict[str, Any]) -> str:
    return "–" if row["top1_ci95"] is None else f"±{100 * row['top1_ci95']:.2f}"


def _big(number: int | None) -> str:
    if number is None:
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
