"""A plot of a run: its loss terms and its accuracy by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_tools.plotting import BLACK, BLUE, GREEN, INK, ORANGE, PURPLE, SKY_BLUE, VERMILLION, light_grid, plain, png
from train.evaluate.multilabel import HEADLINES, headline_of
from train.weights.run_files import write_file

if TYPE_CHECKING:
    import polars

# The line styles tell the curves apart without colour.
_LOSSES = {
    "loss": ("total", BLACK, "-"),
    "loss_ce": ("cross entropy", BLUE, "--"),
    "loss_logit": ("logit term", VERMILLION, "-."),
    "loss_feature": ("feature term", GREEN, ":"),
}
_ACCURACY_COLOUR = BLUE
_REFERENCE_COLOURS = (VERMILLION, GREEN, PURPLE, ORANGE, SKY_BLUE, BLACK)


def plot_curves(
    history: polars.DataFrame, path: str | Path, title: str, references: Mapping[str, float] | None = None
) -> None:
    """Write a PNG of the training loss terms (left) and the test top-1 or mAP (right) over the epochs.

    Args:
        history: one row per epoch with `epoch` (from 0), any of `loss`, `loss_ce`, `loss_logit`, `loss_feature`, and
            `test_top1` or `test_map` in [0, 1]; columns that are missing and values that are null are left out.
        path: of the PNG, 1400 × 560 pixels.
        title: one line above both panels.
        references: label → that figure in [0, 1], drawn as dashed lines (teacher, CLIP, fusion, labels only).
    """
    write_file(Path(path), png(_draw(history, title, dict(references or {}))))


def _draw(history: polars.DataFrame, title: str, references: dict[str, float]) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display, safe in threads

    figure = Figure(figsize=(10, 4), dpi=140, layout="constrained")
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=13, fontweight="bold")
    left, right = figure.subplots(1, 2)
    _plot_losses(left, history)
    _plot_accuracy(right, history, references)
    for axes in (left, right):
        _style_axes(axes, history)
    return figure


def _plot_losses(axes: Any, history: polars.DataFrame) -> None:
    shown = {name: style for name, style in _LOSSES.items() if len(_points(history, name)[0])}
    if list(shown)[:1] == ["loss"] and len(shown) == 2:
        shown = {"loss": ("loss", *_LOSSES["loss"][1:])}  # a single term is the total
    smallest = math.inf
    for name, (label, colour, style) in shown.items():
        epochs, values = _points(history, name)
        axes.plot(epochs, values, style, color=colour, label=label, linewidth=2, marker=_marker(epochs, 2))
        smallest = min(smallest, *values)
    axes.set_title("Training loss, weighted terms" if len(shown) > 1 else "Training loss", loc="left", fontsize=11)
    if shown and smallest > 0:
        axes.set_yscale("log")
        _plain_log_ticks(axes)
    if len(shown) > 1:
        axes.legend(frameon=False, fontsize=10)


def _plot_accuracy(axes: Any, history: polars.DataFrame, references: dict[str, float]) -> None:
    figure = headline_of("test_map" in history.columns)
    epochs, values = _points(history, f"test_{figure}")
    percent = [100 * value for value in values]
    axes.set_title(f"Test {HEADLINES[figure]}, %", loc="left", fontsize=11)
    if not percent and not references:
        axes.text(0.5, 0.5, "not evaluated", transform=axes.transAxes, ha="center", color=INK)
        return
    labels = []
    for (name, value), colour in zip(references.items(), _cycle(_REFERENCE_COLOURS, len(references)), strict=True):
        axes.axhline(100 * value, color=colour, linestyle="--", linewidth=1.2)
        labels.append((100 * value, f"{name} {100 * value:.1f}", colour))
    if percent:
        axes.plot(
            epochs, percent, color=_ACCURACY_COLOUR, linewidth=2.2, marker=_marker(epochs, 20), markersize=4, zorder=3
        )
        labels.append((percent[-1], f"student {percent[-1]:.1f}", _ACCURACY_COLOUR))
    low, high = _accuracy_range(percent, [100 * value for value in references.values()])
    axes.set_ylim(low, high)
    _label_right(axes, labels, low, high)


def _accuracy_range(curve: Sequence[float], references: Sequence[float]) -> tuple[float, float]:
    """Limits of the accuracy axis: they include all references and the last three quarters of the curve.

    The first epochs may fall below them, so that later differences are visible.
    """
    later = list(curve[len(curve) // 4 :]) + list(references)
    low, high = min(later), max([*curve, *references])
    margin = max(0.08 * (high - low), 0.5)
    return max(low - margin, -1.0), min(high + margin, 101.0)


def _label_right(axes: Any, labels: list[tuple[float, str, str]], low: float, high: float) -> None:
    """Write labels to the right of the axes at their heights, moved apart where they would overlap."""
    gap = 0.062 * (high - low)
    labels = sorted(labels)
    heights = _spread([height for height, _, _ in labels], gap, low, high)
    for (value, text, colour), height in zip(labels, heights, strict=True):
        axes.annotate(
            text,
            xy=(1.0, value), xycoords=("axes fraction", "data"),
            xytext=(1.04, height), textcoords=("axes fraction", "data"),
            color=INK, fontsize=10, va="center", annotation_clip=False,
            fontweight="bold" if text.startswith("student") else "normal",
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 1.5, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Sorted heights moved as little as needed to be `gap` apart and, as far as they fit, within [low, high]."""
    placed: list[list[float]] = []  # groups of touching labels, each with the heights that they should have
    for height in heights:
        group = [height]
        while placed and _bottom(group, gap, low, high) < _bottom(placed[-1], gap, low, high) + gap * len(placed[-1]):
            group = placed.pop() + group
        placed.append(group)
    return [_bottom(group, gap, low, high) + gap * place for group in placed for place in range(len(group))]


def _bottom(group: list[float], gap: float, low: float, high: float) -> float:
    """Height of a group's lowest label, when the group is centred on the heights that its labels should have."""
    span = gap * (len(group) - 1)
    return max(min(sum(group) / len(group) - span / 2, high - span), low)


def _style_axes(axes: Any, history: polars.DataFrame) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    epochs = _epochs(history)
    if epochs:
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    light_grid(axes)
    axes.tick_params(labelsize=10)


def _plain_log_ticks(axes: Any) -> None:
    """Ticks at 1, 2, 5, 10, …: between powers of ten alone, a loss that halves would have none."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _points(history: polars.DataFrame, column: str) -> tuple[list[int], list[float]]:
    """The epochs and values of a column, without null and infinite ones."""
    if column not in history.columns:
        return [], []
    points = zip(_epochs(history), history[column].to_list(), strict=True)
    kept = [(epoch, float(value)) for epoch, value in points if value is not None and math.isfinite(value)]
    return [epoch for epoch, _ in kept], [value for _, value in kept]


def _epochs(history: polars.DataFrame) -> list[int]:
    """Numbers of the finished epochs, counted from 1 as in the progress lines and the result."""
    return [epoch + 1 for epoch in history["epoch"].to_list()]


def _marker(epochs: Sequence[int], most: int) -> str:
    """Dots if there are few points, which a line alone would not show."""
    return "o" if len(epochs) <= most else ""


def _cycle(colours: Sequence[str], count: int) -> list[str]:
    return [colours[number % len(colours)] for number in range(count)]
