"""A sweep's results on the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from cache_tools.errors import printable
from cache_tools.screen import TextTable, count, nats, screen_width
from train.evaluate.multilabel import HEADLINES
from train.recipe.loss import LABELS_ALONE
from train.report.comparison import short_names
from train.report.records import FIGURE_ON
from train.report.trials import further_splits, setting_columns
from train.runs.folder import REPORT
from train.runs.result import fitted
from train.sweep.recipe import SweepRecipe
from train.sweep.run import SweepResult
from train.sweep.search_recipe import figure_text
from train.sweep.table import INTERVAL_ON, STD_ON, headline_column


def sweep_text(result: SweepResult, sweep: SweepRecipe) -> str:
    """The table of settings, the best first, then the trials that did not finish."""
    parts = []
    if not result.settings.is_empty():
        parts += [f"{table.text()}\n" for table in _tables(result.settings)]
        seeds = int(result.settings["n"].max())  # type: ignore[arg-type]
        parts += [f"{table.text()}\n" for table in _further_tests(result)]
        parts += [note for note in (_note_on_figures(sweep, seeds), _note_on_gains(result, sweep)) if note is not None]
        figure = HEADLINES[headline_column(result.settings)]
        parts.append(
            f"front: on the Pareto front of {figure} and parameters (p), FLOPs (f), "
            "latency of one image (1) or of 128 (b)."
        )
    if result.best is not None:
        best = result.best
        figure = figure_text(best.metric, best.value)
        parts.append(
            f"Best {best.metric} of the search: {figure}, {printable(best.trial)}. It was chosen for this figure; "
            f"to report it, train it with other seeds:\n  {printable(best.command)}"
        )
    for status in ("failed", "stopped"):
        reasons: dict[str, list[str]] = {}
        for row in result.trials.filter(pl.col("status") == status).iter_rows(named=True):
            reasons.setdefault(row["error"] or f"after {row['epochs_done']} epochs", []).append(row["trial"])
        parts += [printable(f"{status}: {', '.join(names)}: {reason}") for reason, names in reasons.items()]
    parts.append(printable(f"Everything is in {result.folder}; open {result.folder / REPORT} in a browser."))
    if (best_trial := _best_trial(result)) is not None:
        parts.append(printable(f"next: {shlex.join(['evaluate-student', best_trial])}"))
    parts.append(printable(f"next: {shlex.join(['report-students', str(result.folder)])}"))
    return "\n".join(parts)


def _best_trial(result: SweepResult) -> str | None:
    """The folder of the first finished trial of the best setting; None if none is finished."""
    finished = result.trials.filter(pl.col("status") == "finished").drop_nulls("top1")
    if finished.is_empty() or result.settings.is_empty():
        return None
    keys = setting_columns(result.trials)
    best = result.settings.head(1).select(keys)
    return str(finished.join(best, on=keys, nulls_equal=True, maintain_order="left")["folder"][0])


def _note_on_figures(sweep: SweepRecipe, seeds: int) -> str | None:
    """A note on how far the figures can be trusted."""
    if sweep.asha is not None:
        return "Successive halving stopped trials early: use these figures to choose settings, not to report them."
    if sweep.search is not None:
        return None  # the line about the best trial has this warning
    if seeds == 2:
        return (
            "Mean ± standard deviation of two seeds; 95 % is half of the interval of the mean (Student's t), which is "
            "very wide for two. Use --seeds 3 or more."
        )
    if seeds > 2:
        return "Mean ± standard deviation over seeds; 95 % is half of the interval of the mean (Student's t)."
    return "One seed: differences may be chance. Use --seeds 3 to see how much figures vary."


def _note_on_gains(result: SweepResult, sweep: SweepRecipe) -> str | None:
    """How gains are computed, or how to get them; None for a sweep that has nothing to compare with labels."""
    if result.settings["gain_n"].sum():
        return (
            f"gain: {HEADLINES[headline_column(result.settings)]} minus that of the same student on labels alone, "
            "in points, paired by seed (n pairs in brackets where that is fewer)."
        )
    losses = [str(loss) for loss in result.settings["loss"].unique(maintain_order=True)]
    if sweep.search is not None or sweep.trials or not {*losses} - {*LABELS_ALONE}:
        return None
    alone = "bce-labels" if headline_column(result.settings) == "map" else "ce"
    others = ",".join([*sorted({*losses} - {alone}), alone])
    return printable(f"No gain over labels alone is known: add --losses {others}.")


def _tables(settings: pl.DataFrame) -> list[TextTable]:
    """One table; where it is wider than the screen, one each of accuracies, of likelihood and calibration, of costs."""
    names = short_names([key for key in setting_columns(settings) if _is_setting(key)])
    rows = settings.to_dicts()
    own = {title: [_value(row[key]) for row in rows] for key, title in names.items()}
    figure = headline_column(settings)
    accuracy = {"n": [str(row["n"]) for row in rows]}
    accuracy[f"{HEADLINES[figure]} %"] = [_spread(row, figure, 100) for row in rows]
    accuracy["95 %"] = [_half_interval(row, figure) for row in rows]
    if settings["gain_n"].sum():
        accuracy["gain"] = [_spread(row, "gain", 100, sign="+") for row in rows]
        accuracy["its 95 %"] = [_half_interval(row, "gain") for row in rows]
    front = {"front": [_front(row) for row in rows]}
    others = {"BCE": "bce"} if figure == "map" else {"NLL": "nll", "ECE": "ece"}
    quality = {title: [_spread(row, name) for row in rows] for title, name in others.items()}
    costs = _costs(rows)
    whole = _table(own | accuracy | quality | costs | front, len(own))
    width = screen_width()
    if max(map(len, whole.text(1 << 20).splitlines())) <= width:
        return [whole]
    first = {row["student"]: place for place, row in reversed(list(enumerate(rows)))}
    places = sorted(first.values())
    of_students = {title: [cells[place] for place in places] for title, cells in costs.items()}
    students = {"student": [rows[place]["student"] for place in places]}
    return [
        _table(own | accuracy | front, len(own)),
        _table(own | quality, len(own)),
        _table(students | of_students, 1),
    ]


def _further_tests(result: SweepResult) -> list[TextTable]:
    """The table of figures on the test splits after the first; none if there is one test split."""
    settings, splits = result.settings, further_splits(result.settings)
    if not splits:
        return []
    names = short_names([key for key in setting_columns(settings) if _is_setting(key)])
    figure = HEADLINES[headline_column(settings)]
    first = result.trials["test_split"].drop_nulls().unique(maintain_order=True).to_list()
    title = f"{figure} % on the other test splits; all other figures are of {fitted(', '.join(first), 32)}"
    table = TextTable([*names.values(), *(fitted(split, 24) for split in splits)], names=len(names), title=title)
    for row in settings.iter_rows(named=True):
        cells = [_mean_and_std(row[f"{FIGURE_ON}{split}"], row[f"{STD_ON}{split}"], 100) for split in splits]
        table.add_row(*(_value(row[key]) for key in names), *cells)
    return [table]


def _table(columns: Mapping[str, Sequence[str]], names: int) -> TextTable:
    table = TextTable(list(columns), names=names)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def _costs(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    return {
        "params": [count(row["parameters"]) for row in rows],
        "FLOPs": [count(row["flops"]) for row in rows],
        "ms, 1": [_ms(row["latency_1_ms"]) for row in rows],
        "ms, 128": [_ms(row["latency_128_ms"]) for row in rows],
    }


def _value(value: Any) -> str:
    return "" if value is None else str(value)


def _front(row: Mapping[str, Any]) -> str:
    marks = {"p": "parameters", "f": "flops", "1": "latency_1_ms", "b": "latency_128_ms"}
    return "".join(mark for mark, cost in marks.items() if row[f"pareto_{cost}"])


def _is_setting(key: str) -> bool:
    """Whether a column of `over_seeds` is a setting."""
    others = key.endswith(("_std", "_ci95")) or key.startswith(("pareto_", STD_ON, INTERVAL_ON))
    return key not in {"n", "gain_n"} and not others


def _spread(row: Mapping[str, Any], name: str, factor: float | None = None, sign: str = "") -> str:
    """Mean ± standard deviation; in percent or points with a factor, else in nats or as a fraction."""
    return _mean_and_std(row[name], row[f"{name}_std"], factor, sign)


def _mean_and_std(mean: float | None, std: float | None, factor: float | None = None, sign: str = "") -> str:
    if mean is None:
        return "–"

    def shown(value: float, sign: str = "") -> str:
        return nats(value) if factor is None else f"{factor * value:{sign}.2f}"

    return shown(mean, sign) + ("" if std is None else f" ± {shown(std)}")


def _half_interval(row: Mapping[str, Any], name: str) -> str:
    if row[f"{name}_ci95"] is None:
        return "–"
    pairs = f" ({row['gain_n']})" if name == "gain" and row["gain_n"] != row["n"] else ""
    return f"±{100 * row[f'{name}_ci95']:.2f}{pairs}"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
