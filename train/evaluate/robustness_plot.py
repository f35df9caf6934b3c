"""A plot of robustness: error by severity for each corruption, for the student and its baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cache_tools.plotting import BLUE, GREY, INK, VERMILLION, light_grid, plain, png
from train.evaluate.corruptions import CORRUPTIONS, SEVERITIES

if TYPE_CHECKING:
    import polars as pl

    from train.evaluate.robustness import CorruptionError, RobustnessSummary

_COLUMNS = 5


def plot_robustness(
    errors: pl.DataFrame,
    summary: RobustnessSummary,
    title: str,
    *,
    num_classes: int,
    baseline: pl.DataFrame | None = None,
    student_name: str = "student",
    baseline_name: str = "baseline",
) -> bytes:
    """A PNG of 3 × 5 panels, one per corruption: error in % over severity, where 0 means clean images.

    Args:
        errors, baseline: frames of `train.evaluate.robustness.robustness`.
        num_classes: gives the error of guessing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 7.9), dpi=140, layout="constrained")
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    panels = figure.subplots(len(CORRUPTIONS) // _COLUMNS, _COLUMNS, sharex=True, sharey=True)
    lines = [(baseline, summary.baseline_clean_error, baseline_name, VERMILLION, "s--")] if baseline is not None else []
    lines.append((errors, summary.clean_error, student_name, BLUE, "o-"))
    for axes, row in zip(panels.flat, summary.corruptions, strict=True):
        axes.axhline(100 * (1 - 1 / num_classes), color=GREY, linewidth=1, linestyle=":", label="guessing")
        for frame, clean, name, colour, style in lines:
            values = [100 * (clean or 0.0), *_percent(frame, row.corruption)]
            axes.plot((0, *SEVERITIES), values, style, color=colour, label=plain(name), linewidth=1.8, markersize=4.5)
        axes.set_title(_panel_title(row), fontsize=10.5, loc="left", color=INK)
        _style_axes(axes)
    for axes in panels[:, 0]:
        axes.set_ylabel("error, %", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("severity", fontsize=10)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower right", ncols=3, frameon=False, fontsize=10)
    return png(figure)


def _panel_title(row: CorruptionError) -> str:
    name = row.corruption.replace("_", " ").replace("jpeg", "JPEG")
    return name if row.ce is None else f"{name}, CE {row.ce:.2f}"


def _percent(frame: pl.DataFrame, corruption: str) -> list[float]:
    rows = frame.filter(frame["corruption"] == corruption).sort("severity")
    return [100 * error for error in rows["error"].to_list()]


def _style_axes(axes: Any) -> None:
    axes.set_xticks((0, *SEVERITIES), ("clean", *map(str, SEVERITIES)))
    axes.set_ylim(0, 103)
    axes.set_yticks((0, 25, 50, 75, 100))
    light_grid(axes)
    axes.tick_params(labelsize=9)
