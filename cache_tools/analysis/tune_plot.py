"""The plot of `tune-fusion`: NLL over teacher weight and CLIP scale, with the known settings marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cache_tools.analysis.tune import OFFICIAL_SCALE, TuneResult
from cache_tools.plotting import BLUE, DARK_GREY, INK, YELLOW, new_figure, png, style_axes

# Contours of NLL above the best: fine near the best, coarse far from it.
_STEPS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def plot_surface(result: TuneResult, path: Path) -> None:
    """Write a PNG: a surface, or a curve if there is only one weight or one scale."""
    path.write_bytes(png(_draw(result)))


def _draw(result: TuneResult) -> Any:
    figure = new_figure(10, 6.2, "Which fusion is most likely to be right: NLL of the fused softmax", _subtitle(result))
    axes = figure.subplots()
    if min(len(result.weights), len(result.scales)) > 1:
        _surface(figure, axes, result)
    else:
        _curve(axes, result)
    return figure


def _surface(figure: Any, axes: Any, result: TuneResult) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import FuncFormatter, NullFormatter

    above = np.array(result.nll)
    above = above - above.min()
    scales = [scale.value for scale in result.scales]
    last = next((number for number, step in enumerate(_STEPS) if step >= above.max()), len(_STEPS) - 1)
    steps = list(_STEPS[: max(last, 2) + 1])
    colours = colormaps["viridis_r"]
    beyond = "max" if above.max() > steps[-1] else "neither"
    image = axes.contourf(
        result.weights, scales, above.T, levels=steps, cmap=colours, norm=BoundaryNorm(steps, colours.N), extend=beyond
    )
    axes.contour(result.weights, scales, above.T, levels=steps[1:], colors="white", linewidths=0.5)
    bar = figure.colorbar(image, ax=axes, pad=0.03, aspect=28)
    bar.set_label("NLL above the best of the grid, nats", fontsize=10)
    bar.set_ticks(steps, labels=[f"{step:g}" for step in steps])
    axes.set(yscale="log", xlim=(result.weights[0], result.weights[-1]), ylim=(scales[0], scales[-1]))
    axes.set_xlabel("teacher weight α  (0: CLIP alone, 1: teacher alone)", fontsize=10)
    axes.set_ylabel("CLIP scale", fontsize=10)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _known_scales(axes, result)
    axes.plot(result.own_weight, result.own_scale, "o", color="white", markeredgecolor=INK, markeredgewidth=1.8,
              markersize=11, label="as the cache was built", clip_on=False, zorder=4)  # fmt: skip
    axes.plot(result.chosen_weight, result.chosen_scale.value, "*", color=YELLOW, markeredgecolor=INK, markersize=19,
              label="chosen", clip_on=False, zorder=5)  # fmt: skip
    _legend(axes)
    axes.tick_params(labelsize=10)


def _known_scales(axes: Any, result: TuneResult) -> None:
    """Draw the known scales as dashed lines with their names on the right, moved apart where they would touch."""
    known = [
        (scale.value, scale.name or "official")
        for scale in result.scales
        if scale.name or scale.value == OFFICIAL_SCALE
    ]
    low, high = np.log(axes.get_ylim())
    heights = [(np.log(value) - low) / (high - low) for value, _ in known]
    for number in range(1, len(heights)):
        heights[number] = max(heights[number], heights[number - 1] + 0.045)
    for (value, name), height in zip(known, heights, strict=True):
        axes.axhline(value, color="white", linewidth=2.6, alpha=0.7)  # a light rim, visible on dark and bright
        axes.axhline(value, color=INK, linewidth=1.1, linestyle="--")
        axes.annotate(
            f"{name} {value:.3g}", xy=(1.0, value), xycoords=("axes fraction", "data"),
            xytext=(1.025, height), textcoords="axes fraction", va="center", fontsize=9.5, color=INK,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": DARK_GREY, "linewidth": 0.8, "relpos": (0, 0.5)},
        )  # fmt: skip


def _curve(axes: Any, result: TuneResult) -> None:
    nll = np.array(result.nll)
    if len(result.weights) == 1:
        x, y = [scale.value for scale in result.scales], nll[0]
        axes.set_xscale("log")
        axes.set_xlabel(f"CLIP scale, at teacher weight {result.weights[0]:g}", fontsize=10)
    else:
        x, y = list(result.weights), nll[:, 0]
        axes.set_xlabel(f"teacher weight α, at CLIP scale {result.scales[0].value:.4g}", fontsize=10)
    axes.plot(x, y, "-o", color=BLUE, linewidth=2, markersize=4)
    best = int(np.argmin(y))
    axes.plot(x[best], y[best], "*", color=YELLOW, markeredgecolor=INK, markersize=19, label="chosen", zorder=5)
    axes.set_ylabel("NLL, nats", fontsize=10)
    _legend(axes)
    style_axes(axes)


def _legend(axes: Any) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False, fontsize=10, borderaxespad=0.2)


def _subtitle(result: TuneResult) -> str:
    views = f"view {result.views[0]}" if len(result.views) == 1 else f"{len(result.views)} views"
    chosen = result.settings[0]
    return (
        f"{result.dataset}, {result.samples_chosen_on:,} samples × {views}, temperature {result.temperature:g}; "
        f"chosen: weight {result.chosen_weight:g}, scale {result.chosen_scale.value:.4g}, "
        f"held-out NLL {chosen.nll:.4f} (as built {result.settings[1].nll:.4f})"
    )
