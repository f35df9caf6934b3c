"""What the pictures of `cache-tools` share: colours, titles, axes. Figures are made without pyplot: no global state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


# Okabe and Ito's colours, told apart with every common colour blindness; markers and order say the same again.
COLOURS = {"teacher": "#0072B2", "clip": "#E69F00", "fusion": "#009E73"}
MARKERS = {"teacher": "s", "clip": "^", "fusion": "o"}
NAMES = {"teacher": "teacher", "clip": "CLIP", "fusion": "fusion"}
INK, FAINT, GRID = "#222222", "#666666", "#e3e3e3"


def new_figure(width: float, height: float, title: str, subtitle: str) -> Any:
    """A figure in inches at 140 dpi, with a bold title and a line below it that says what it was made of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    # Constrained layout keeps room for suptitle only: the second line is part of it, restyled below.
    figure.suptitle(f"{plain(title)}\n", x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK, linespacing=1.3)
    figure.text(0.01, 1.0 - 0.36 / height, plain(subtitle), ha="left", va="top", fontsize=9.5, color=FAINT)
    return figure


def dress(axes: Any, *, grid: str = "y") -> None:
    """No frame above and right, a light grid behind."""
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10, colors=INK)


def plain(text: str) -> str:
    """A text with names of the user's, as matplotlib has to have it: dollar signs would start a formula."""
    return text.replace("$", r"\$")


def shorten(text: str, most: int = 22) -> str:
    """A class name that fits beside an axis, plain."""
    return plain(text if len(text) <= most else f"{text[: most - 1]}…")


def legend_above(axes: Any, patches: list[tuple[str, str]], points: Sequence[tuple[str, str, str]] = ()) -> None:
    """One line of keys above the axes: coloured patches, then markers."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=colour, label=label) for label, colour in patches]
    handles += [
        Line2D([], [], marker=marker, color=colour, linewidth=0, markersize=8, label=label)
        for label, colour, marker in points
    ]
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(handles), frameon=False,
        fontsize=10, borderaxespad=0.2, borderpad=0.2, handletextpad=0.5, columnspacing=1.6,
    )  # fmt: skip


# Okabe and Ito's colours, told apart with every common colour blindness.
BLUE, VERMILLION, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8a8a8a", "#222222"


def png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
