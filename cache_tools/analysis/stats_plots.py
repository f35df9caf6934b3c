"""Plots of a `TeacherStats`: quadrants, reliability, gains and consistency of the classes, stability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cache_tools.analysis.stats import About, TeacherStats, put_file
from cache_tools.analysis.tables import CALIBRATION_BINS, QUADRANTS
from cache_tools.files import SafeFolder
from cache_tools.plotting import (
    BLUE,
    COLOURS,
    DARK_GREY,
    INK,
    LABELS,
    LIGHT_BLUE,
    LIGHT_GREY,
    LIGHT_ORANGE,
    MARKERS,
    VERMILLION,
    legend_above,
    new_figure,
    png,
    shorten,
    style_axes,
)

# Up to this many classes, each has a line with its name.
NAMED_CLASSES = 40
# With more classes, only so many of the highest and of the lowest are named.
_NAMED_EXTREMES = 6
# Rounding in float32 leaves up to this for equal views: a curve that starts high at the left edge has such samples.
_LEAST_DIVERGENCE = 1e-6
_QUADRANTS = {
    "confident_right": ("confident and right", BLUE, "white"),
    "unsure_right": ("unsure and right", LIGHT_BLUE, INK),
    "unsure_wrong": ("unsure and wrong", LIGHT_ORANGE, INK),
    "confident_wrong": ("confident and wrong", VERMILLION, "white"),
}


def plot_all(stats: TeacherStats, folder: Path) -> list[Path]:
    """Write all plots: no gains for a single source, no stability for a single view.

    Returns:
        the files, `NAME.png` below `folder`. Plots of an earlier run that no longer apply are removed.
    """
    drawn = {
        "quadrants": draw_quadrants(stats),
        "reliability": draw_reliability(stats),
        "class_gains": draw_gains(stats) if len(stats.about.sources) > 1 else None,
        "consistency": draw_consistency(stats) if len(stats.about.class_names) > 2 else None,
        "stability": draw_stability(stats) if not stats.stability.is_empty() else None,
    }
    files, written = SafeFolder(folder), list[Path]()
    for name, figure in drawn.items():
        if figure is None:
            files.remove(f"{name}.png")
            continue
        put_file(files, f"{name}.png", png(figure))
        written.append(folder / f"{name}.png")
    return written


def draw_quadrants(stats: TeacherStats) -> Any:
    """Stacked bars, one per source: the shares of confident or unsure and right or wrong predictions."""
    sources = stats.about.sources
    figure = new_figure(10, 1.7 + 0.75 * len(sources), "Confident or unsure, right or wrong", _subtitle(stats.about))
    axes = figure.subplots()
    overall = {row["source"]: row for row in stats.summary.filter(pl.col("view").is_null()).to_dicts()}
    for height, source in enumerate(reversed(sources)):
        left, narrow = 0.0, []
        for name in QUADRANTS:
            label, colour, ink = _QUADRANTS[name]
            share = 100 * overall[source][name]
            axes.barh(height, share, left=left, color=colour, height=0.66, edgecolor="white", linewidth=1.2)
            if share >= 5.5:
                axes.text(left + share / 2, height, f"{share:.2f} %", ha="center", va="center", color=ink, fontsize=11)
            else:
                narrow.append(f"{label} {share:.2f} %")
            left += share
        axes.text(100, height + 0.36, ", ".join(narrow), ha="right", va="bottom", fontsize=9, color=DARK_GREY)
    axes.set_yticks(range(len(sources)), [LABELS[source] for source in reversed(sources)])
    axes.set(xlim=(0, 100), ylim=(-0.45, len(sources) - 0.35))
    axes.set_xlabel("share of all predictions, %", fontsize=10)
    style_axes(axes, grid="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=11)
    legend_above(axes, [(label, colour) for label, colour, _ in _QUADRANTS.values()])
    return figure


def draw_reliability(stats: TeacherStats) -> Any:
    """Accuracy in each bin of the confidence, one panel per source; below it the share of predictions in the bin."""
    sources = stats.about.sources
    figure = new_figure(max(9.0, 1.0 + 3.2 * len(sources)), 5.0, "Reliability", _subtitle(stats.about))
    panels = figure.subplots(2, len(sources), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1))
    overall = stats.reliability.filter(pl.col("view").is_null())
    ece = {row["source"]: row["ece"] for row in stats.summary.filter(pl.col("view").is_null()).to_dicts()}
    for source, (upper, lower) in zip(sources, panels.T, strict=True):
        bins = overall.filter((pl.col("source") == source) & (pl.col("n") > 0))
        share = 100 * bins["n"].to_numpy() / bins["n"].sum()
        centre = (bins["low"] + bins["high"]).to_numpy() / 2
        width = 0.92 / CALIBRATION_BINS
        accuracy, confidence = bins["accuracy"].to_numpy(), bins["confidence"].to_numpy()
        upper.bar(centre, accuracy, width=width, color=COLOURS[source], alpha=0.85, label="accuracy")
        upper.bar(
            centre, confidence - accuracy, bottom=accuracy, width=width, label="gap to the confidence",
            facecolor="none", edgecolor=VERMILLION, hatch="////", linewidth=0.9,
        )  # fmt: skip
        upper.plot([0, 1], [0, 1], color=INK, linewidth=1.1, linestyle="--")
        upper.set_title(f"{LABELS[source]}: ECE {ece[source]:.4f}", loc="left", fontsize=11, color=INK)
        lower.bar(centre, share, width=width, color=COLOURS[source], alpha=0.85)
        lower.set_xlabel("confidence", fontsize=10)
        for axes in (upper, lower):
            axes.axvline(stats.about.confident, color=DARK_GREY, linewidth=1, linestyle=":")
            style_axes(axes)
        upper.set(xlim=(0, 1), ylim=(0, 1))
    panels[0, 0].set_ylabel("accuracy", fontsize=10)
    panels[1, 0].set_ylabel("share, %", fontsize=10)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )
    return figure


def draw_stability(stats: TeacherStats) -> Any:
    """Left: the share of samples with the same top-1 in all views. Right: the distribution of their divergence."""
    sources = stats.about.sources
    figure = new_figure(10, 4.2, f"Stability over {len(stats.about.views)} views", _subtitle(stats.about))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.9))
    same = {row["source"]: row["same_top1"] for row in stats.stability.to_dicts()}
    least, keys = 0.1, []
    for place, source in enumerate(sources):
        share = 100 * same[source]
        left.bar(place, share, color=COLOURS[source], width=0.62)
        left.text(place, share + 1.5, f"{share:.1f}", ha="center", va="bottom", fontsize=11, color=INK)
        divergence = np.sort(stats.samples[f"{source}_divergence"].to_numpy())
        cumulative = 100 * np.arange(1, len(divergence) + 1) / len(divergence)
        right.step(
            np.maximum(divergence, _LEAST_DIVERGENCE), cumulative, where="post", color=COLOURS[source], linewidth=2,
            marker=MARKERS[source], markevery=0.125,
        )  # fmt: skip
        keys.append((f"{LABELS[source]}, mean {divergence.mean():.4f}", COLOURS[source], MARKERS[source]))
        least = min(least, max(divergence[0], _LEAST_DIVERGENCE))
    left.set_xticks(range(len(sources)), [LABELS[source] for source in sources])
    left.set(ylim=(0, 112), yticks=range(0, 101, 20))
    left.set_title("Same top-1 in all views, % of samples", loc="left", fontsize=11, color=INK)
    right.set(xscale="log", ylim=(0, 103), xlim=(least / 1.3, np.log(len(stats.about.views))))
    right.set_xlabel("JS divergence of a sample's views, nats", fontsize=10)
    right.set_ylabel("samples at or below, %", fontsize=10)
    legend_above(right, [], keys)
    for axes in (left, right):
        style_axes(axes)
    return figure


def draw_gains(stats: TeacherStats) -> Any:
    """Top-1 of the fusion minus that of the teacher (bars) and of CLIP (triangles), for each class, sorted."""
    rows = stats.classes.drop_nulls("gain_over_teacher").sort("gain_over_teacher", descending=True)
    teacher, clip = (100 * rows[f"gain_over_{name}"].to_numpy() for name in ("teacher", "clip"))
    few = len(rows) <= NAMED_CLASSES
    height = 1.7 + 0.27 * len(rows) if few else 5.0
    figure = new_figure(10, height, "Gain of the fusion, class by class", _subtitle(stats.about))
    axes = figure.subplots()
    place = np.arange(len(rows))
    colours = np.where(teacher >= 0, COLOURS["teacher"], VERMILLION)
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
    style_axes(axes, grid="x" if few else "y")
    legend_above(
        axes,
        [("over the teacher", COLOURS["teacher"]), ("below the teacher", VERMILLION)],
        [("over CLIP", COLOURS["clip"], "^")],
    )
    return figure


def draw_consistency(stats: TeacherStats) -> Any:
    """Non-target consistency of every class: dots per source; for many classes the fusion against the others."""
    consistency = f"{stats.about.main}_consistency"
    rows = stats.classes.drop_nulls(consistency).sort(consistency, descending=True)
    title = "Non-target consistency: how alike the other classes are rated within a class"
    if len(rows) <= NAMED_CLASSES:
        return _consistency_dots(stats, rows, title)
    others = stats.about.sources[:-1]
    if not others:
        return _consistency_ranks(stats, rows, title)
    figure = new_figure(10, 5.4, title, _subtitle(stats.about))
    y = rows[consistency].to_numpy()
    columns = [rows[f"{source}_consistency"].to_numpy() for source in others]
    low, high = (bound(y.tolist() + [edge(x) for x in columns]) for bound, edge in ((min, np.min), (max, np.max)))
    limits = (low - 0.05 * (high - low), high + 0.05 * (high - low))
    for axes, source, x in zip(figure.subplots(1, 2, sharey=True), others, columns, strict=True):
        axes.plot(limits, limits, color=INK, linewidth=1.1, linestyle="--")
        axes.plot(x, y, MARKERS[source], color=COLOURS[source], markersize=5, alpha=0.75)
        share = 100 * (y > x).mean()
        axes.set_title(f"fusion higher in {share:.0f} % of {len(rows)} classes", loc="left", fontsize=11, color=INK)
        axes.set_xlabel(f"consistency of {_with_article(source)}", fontsize=10)
        axes.set(xlim=limits, ylim=limits, aspect="equal")
        style_axes(axes, grid="both")
    figure.axes[0].set_ylabel("consistency of the fusion", fontsize=10)
    return figure


def _consistency_dots(stats: TeacherStats, rows: pl.DataFrame, title: str) -> Any:
    figure = new_figure(10, 1.9 + 0.27 * len(rows), title, _subtitle(stats.about))
    axes = figure.subplots()
    place = np.arange(len(rows))
    columns = np.stack([rows[f"{source}_consistency"].to_numpy() for source in stats.about.sources])
    axes.hlines(place, columns.min(axis=0), columns.max(axis=0), color=LIGHT_GREY, linewidth=2.5, zorder=1)
    for source, values in zip(stats.about.sources, columns, strict=True):
        axes.plot(
            values,
            place,
            MARKERS[source],
            color=COLOURS[source],
            markersize=8,
            markeredgecolor="white",
            zorder=2,
        )
    axes.set_yticks(place, [shorten(name) for name in rows["class"]])
    axes.set(ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlabel("mean pairwise cosine similarity of non-target distributions", fontsize=10)
    style_axes(axes, grid="both")
    legend_above(axes, [], [(LABELS[s], COLOURS[s], MARKERS[s]) for s in stats.about.sources])
    return figure


def _consistency_ranks(stats: TeacherStats, rows: pl.DataFrame, title: str) -> Any:
    figure = new_figure(10, 5.0, title, _subtitle(stats.about))
    axes = figure.subplots()
    main = stats.about.main
    values = rows[f"{main}_consistency"].to_numpy()
    axes.bar(np.arange(len(rows)), values, color=COLOURS[main], width=1.0)
    axes.set_ylabel(f"consistency of {_with_article(main)}", fontsize=10)
    _ranks(axes, rows["class"].to_list(), [f"{value:.3f}" for value in values])
    style_axes(axes)
    return figure


def _ranks(axes: Any, names: list[str], figures: list[str]) -> None:
    """Label an axis of many sorted classes: names only the first and last few, on the right."""
    lines = [f"{shorten(name)}  {figure}" for name, figure in zip(names, figures, strict=True)]
    first, last = lines[:_NAMED_EXTREMES], lines[-_NAMED_EXTREMES:]
    axes.text(1.015, 1.0, "\n".join(["highest", *first]), transform=axes.transAxes, va="top", fontsize=9, color=INK)
    axes.text(1.015, 0.0, "\n".join(["lowest", *last]), transform=axes.transAxes, va="bottom", fontsize=9, color=INK)
    axes.use_sticky_edges = False
    axes.margins(x=0.01, y=0.04)
    axes.set_xlabel(f"{len(names)} classes, sorted", fontsize=10)


def _subtitle(about: About) -> str:
    """Dataset, rows and settings, for every plot."""
    views = f"view {about.views[0]}" if len(about.views) == 1 else f"{len(about.views)} views"
    return (
        f"{about.dataset}, {about.num_samples:,} samples × {views}; confident: probability ≥ {about.confident:g} "
        f"at temperature {about.temperature:g}; {_settings(about)}"
    )


def _settings(about: About) -> str:
    scale = f"CLIP scale {' and '.join(f'{scale:.4g}' for scale in about.clip_scales)}"
    if about.teacher_weight is None:
        return "the teacher alone" if about.main == "teacher" else f"CLIP alone, {scale}"
    return f"teacher weight {about.teacher_weight:g}, {scale}"


def _with_article(source: str) -> str:
    return LABELS[source] if source == "clip" else f"the {LABELS[source]}"
