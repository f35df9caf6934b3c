"""Pictures of a `TeacherStats`: quadrants, reliability, gains and consistency of the classes, stability."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cache_tools.class_plots import draw_consistency, draw_gains
from cache_tools.plot_style import COLOURS, FAINT, INK, MARKERS, NAMES, dress, legend_above, new_figure, subtitle
from cache_tools.stats import TeacherStats, put_file
from cache_tools.view_tables import CALIBRATION_BINS, QUADRANTS

# Below this lies what float32 leaves of equal views: a curve that starts high at the left edge has such samples.
_LEAST_DIVERGENCE = 1e-6
_QUADRANTS = {
    "confident_right": ("confident and right", "#0072B2", "white"),
    "unsure_right": ("unsure and right", "#8CCBF0", INK),
    "unsure_wrong": ("unsure and wrong", "#F2C667", INK),
    "confident_wrong": ("confident and wrong", "#D55E00", "white"),
}


def plot_all(stats: TeacherStats, folder: Path) -> list[Path]:
    """Write every picture that the figures allow; a fused cache has no gains, a single view no stability.

    Returns:
        the files, `NAME.png` below `folder`; pictures of an earlier run that no longer apply are removed.
    """
    drawn = {
        "quadrants": draw_quadrants(stats),
        "reliability": draw_reliability(stats),
        "class_gains": draw_gains(stats) if len(stats.about.sources) > 1 else None,
        "consistency": draw_consistency(stats) if len(stats.about.class_names) > 2 else None,
        "stability": draw_stability(stats) if not stats.stability.is_empty() else None,
    }
    written = []
    for name, figure in drawn.items():
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        put_file(path, picture.getbuffer())
        written.append(path)
    return written


def draw_quadrants(stats: TeacherStats) -> Any:
    """Stacked bars, one per source: confident or unsure, right or wrong."""
    sources = stats.about.sources
    figure = new_figure(10, 1.7 + 0.75 * len(sources), "Confident or unsure, right or wrong", subtitle(stats.about))
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
        axes.text(100, height + 0.36, ", ".join(narrow), ha="right", va="bottom", fontsize=9, color=FAINT)
    axes.set_yticks(range(len(sources)), [NAMES[source] for source in reversed(sources)])
    axes.set(xlim=(0, 100), ylim=(-0.45, len(sources) - 0.35))
    axes.set_xlabel("share of all predictions, %", fontsize=10)
    dress(axes, grid="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=11)
    legend_above(axes, [(label, colour) for label, colour, _ in _QUADRANTS.values()])
    return figure


def draw_reliability(stats: TeacherStats) -> Any:
    """Accuracy in each bin of the confidence, side by side; below it how many predictions a bin holds."""
    sources = stats.about.sources
    figure = new_figure(max(9.0, 1.0 + 3.2 * len(sources)), 5.0, "Reliability", subtitle(stats.about))
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
            facecolor="none", edgecolor="#D55E00", hatch="////", linewidth=0.9,
        )  # fmt: skip
        upper.plot([0, 1], [0, 1], color=INK, linewidth=1.1, linestyle="--")
        upper.set_title(f"{NAMES[source]}: ECE {ece[source]:.4f}", loc="left", fontsize=11, color=INK)
        lower.bar(centre, share, width=width, color=COLOURS[source], alpha=0.85)
        lower.set_xlabel("confidence", fontsize=10)
        for axes in (upper, lower):
            axes.axvline(stats.about.confident, color=FAINT, linewidth=1, linestyle=":")
            dress(axes)
        upper.set(xlim=(0, 1), ylim=(0, 1))
    panels[0, 0].set_ylabel("accuracy", fontsize=10)
    panels[1, 0].set_ylabel("share, %", fontsize=10)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )
    return figure


def draw_stability(stats: TeacherStats) -> Any:
    """Left: how often all views agree on the top-1. Right: how far a sample's views are apart, as a distribution."""
    sources = stats.about.sources
    figure = new_figure(10, 4.2, f"Stability over {len(stats.about.views)} views", subtitle(stats.about))
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
        keys.append((f"{NAMES[source]}, mean {divergence.mean():.4f}", COLOURS[source], MARKERS[source]))
        least = min(least, max(divergence[0], _LEAST_DIVERGENCE))
    left.set_xticks(range(len(sources)), [NAMES[source] for source in sources])
    left.set(ylim=(0, 112), yticks=range(0, 101, 20))
    left.set_title("Same top-1 in all views, % of samples", loc="left", fontsize=11, color=INK)
    right.set(xscale="log", ylim=(0, 103), xlim=(least / 1.3, np.log(len(stats.about.views))))
    right.set_xlabel("JS divergence of a sample's views, nats", fontsize=10)
    right.set_ylabel("samples at or below, %", fontsize=10)
    legend_above(right, [], keys)
    for axes in (left, right):
        dress(axes)
    return figure
