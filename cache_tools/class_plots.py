"""Pictures of the classes in a `TeacherStats`: gains of the fusion, non-target consistency."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from cache_tools.plot_style import COLOURS, INK, MARKERS, NAMES, dress, legend_above, new_figure, shorten, subtitle
from cache_tools.stats import TeacherStats

# Up to so many classes each has a line with its name.
NAMED_CLASSES = 40
_NAMED_EXTREMES = 6


def draw_gains(stats: TeacherStats) -> Any:
    """Top-1 of the fusion minus that of the teacher (bars) and of CLIP (triangles), class by class, sorted."""
    rows = stats.classes.drop_nulls("gain_over_teacher").sort("gain_over_teacher", descending=True)
    teacher, clip = (100 * rows[f"gain_over_{name}"].to_numpy() for name in ("teacher", "clip"))
    few = len(rows) <= NAMED_CLASSES
    height = 1.7 + 0.27 * len(rows) if few else 5.0
    figure = new_figure(10, height, "Gain of the fusion, class by class", subtitle(stats.about))
    axes = figure.subplots()
    place = np.arange(len(rows))
    colours = np.where(teacher >= 0, COLOURS["teacher"], "#D55E00")
    if few:
        axes.barh(place, teacher, color=colours, height=0.7, label="over the teacher")
        axes.plot(clip, place, "^", color=COLOURS["clip"], markeredgecolor=INK, markersize=7, linewidth=0)
        axes.set_yticks(place, [shorten(name) for name in rows["class"]])
        axes.set(ylim=(len(rows) - 0.4, -0.6))
        axes.set_xlabel("points of top-1", fontsize=10)
        axes.axvline(0, color=INK, linewidth=1)
    else:
        axes.bar(place, teacher, color=colours, width=1.0)
        axes.plot(place, clip, "^", color=COLOURS["clip"], markeredgecolor=INK, markeredgewidth=0.4, markersize=5)
        axes.set_ylabel("points of top-1", fontsize=10)
        axes.axhline(0, color=INK, linewidth=1)
        _ranks(axes, rows["class"].to_list(), [f"{gain:+.1f}" for gain in teacher])
    dress(axes, grid="x" if few else "y")
    legend_above(
        axes,
        [("over the teacher", COLOURS["teacher"]), ("below the teacher", "#D55E00")],
        [("over CLIP", COLOURS["clip"], "^")],
    )
    return figure


def draw_consistency(stats: TeacherStats) -> Any:
    """Non-target consistency of every class: dots per source, or the fusion against the others for many classes."""
    rows = stats.classes.drop_nulls("fusion_consistency").sort("fusion_consistency", descending=True)
    title = "Non-target consistency: how alike the other classes are rated within a class"
    if len(rows) <= NAMED_CLASSES:
        return _consistency_dots(stats, rows, title)
    others = [source for source in stats.about.sources if source != "fusion"]
    if not others:
        return _consistency_ranks(stats, rows, title)
    figure = new_figure(10, 5.4, title, subtitle(stats.about))
    y = rows["fusion_consistency"].to_numpy()
    columns = [rows[f"{source}_consistency"].to_numpy() for source in others]
    low, high = (bound(y.tolist() + [edge(x) for x in columns]) for bound, edge in ((min, np.min), (max, np.max)))
    limits = (low - 0.05 * (high - low), high + 0.05 * (high - low))
    for axes, source, x in zip(figure.subplots(1, 2, sharey=True), others, columns, strict=True):
        axes.plot(limits, limits, color=INK, linewidth=1.1, linestyle="--")
        axes.plot(x, y, MARKERS[source], color=COLOURS[source], markersize=5, alpha=0.75)
        share = 100 * (y > x).mean()
        axes.set_title(f"fusion higher in {share:.0f} % of {len(rows)} classes", loc="left", fontsize=11, color=INK)
        axes.set_xlabel(f"consistency of {'the teacher' if source == 'teacher' else NAMES[source]}", fontsize=10)
        axes.set(xlim=limits, ylim=limits, aspect="equal")
        dress(axes, grid="both")
    figure.axes[0].set_ylabel("consistency of the fusion", fontsize=10)
    return figure


def _consistency_dots(stats: TeacherStats, rows: pl.DataFrame, title: str) -> Any:
    figure = new_figure(10, 1.9 + 0.27 * len(rows), title, subtitle(stats.about))
    axes = figure.subplots()
    place = np.arange(len(rows))
    columns = np.stack([rows[f"{source}_consistency"].to_numpy() for source in stats.about.sources])
    axes.hlines(place, columns.min(axis=0), columns.max(axis=0), color="#c8c8c8", linewidth=2.5, zorder=1)
    for source, values in zip(stats.about.sources, columns, strict=True):
        axes.plot(
            values, place, MARKERS[source], color=COLOURS[source], markersize=8, markeredgecolor="white", zorder=2
        )
    axes.set_yticks(place, [shorten(name) for name in rows["class"]])
    axes.set(ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlabel("mean pairwise cosine similarity of non-target distributions", fontsize=10)
    dress(axes, grid="both")
    legend_above(axes, [], [(NAMES[s], COLOURS[s], MARKERS[s]) for s in stats.about.sources])
    return figure


def _consistency_ranks(stats: TeacherStats, rows: pl.DataFrame, title: str) -> Any:
    figure = new_figure(10, 5.0, title, subtitle(stats.about))
    axes = figure.subplots()
    values = rows["fusion_consistency"].to_numpy()
    axes.bar(np.arange(len(rows)), values, color=COLOURS["fusion"], width=1.0)
    axes.set_ylabel("consistency of the fusion", fontsize=10)
    _ranks(axes, rows["class"].to_list(), [f"{value:.3f}" for value in values])
    dress(axes)
    return figure


def _ranks(axes: Any, names: list[str], figures: list[str]) -> None:
    """Too many classes for a line each: sorted along the axis, the first and last few by name on the right."""
    lines = [f"{shorten(name)}  {figure}" for name, figure in zip(names, figures, strict=True)]
    first, last = lines[:_NAMED_EXTREMES], lines[-_NAMED_EXTREMES:]
    axes.text(1.015, 1.0, "\n".join(["highest", *first]), transform=axes.transAxes, va="top", fontsize=9, color=INK)
    axes.text(1.015, 0.0, "\n".join(["lowest", *last]), transform=axes.transAxes, va="bottom", fontsize=9, color=INK)
    axes.use_sticky_edges = False
    axes.margins(x=0.01, y=0.04)
    axes.set_xlabel(f"{len(names)} classes, sorted", fontsize=10)
