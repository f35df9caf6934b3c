"""Colours, titles and axes that every matplotlib figure shares. Figures are made without pyplot: no global state."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

from cache_tools.errors import printable

# Okabe and Ito's palette: people with any common colour blindness can tell the colours apart.
BLACK, ORANGE, SKY_BLUE, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
LIGHT_BLUE, LIGHT_ORANGE = "#8CCBF0", "#F2C667"
INK, DARK_GREY, GREY, LIGHT_GREY, GRID = "#222222", "#666666", "#8a8a8a", "#c8c8c8", "#e3e3e3"

# By source of the predictions; markers and order carry the same information as the colours.
COLOURS = {"teacher": BLUE, "clip": ORANGE, "fusion": GREEN, "student": PURPLE}
MARKERS = {"teacher": "s", "clip": "^", "fusion": "o", "student": "D"}
LABELS = {"teacher": "teacher", "clip": "CLIP", "fusion": "fusion", "student": "student"}


def new_figure(width: float, height: float, title: str, subtitle: str) -> Any:
    """A figure of `width` × `height` inches at 140 dpi, with a bold title and a subtitle that names the data."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    # Constrained layout reserves room for suptitle only, so the suptitle ends in an empty line for the subtitle.
    figure.suptitle(f"{plain(title)}\n", x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK, linespacing=1.3)
    figure.text(0.01, 1.0 - 0.36 / height, plain(subtitle), ha="left", va="top", fontsize=9.5, color=DARK_GREY)
    return figure


def new_canvas(width: float, height: float) -> tuple[Any, Any]:
    """A figure of `width` × `height` inches at 140 dpi, and its invisible axes in inches from the top left corner."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def style_axes(axes: Any, *, grid: str = "y") -> None:
    """Draw a light grid, no frame above and right, and dark tick labels."""
    light_grid(axes, grid)
    axes.tick_params(labelsize=10, colors=INK)


def light_grid(axes: Any, grid: str = "y") -> None:
    """Draw a light grid behind the data along `grid` (x, y or both), and no frame above and right."""
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_above(axes: Any, patches: list[tuple[str, str]], points: Sequence[tuple[str, str, str]] = ()) -> None:
    """Put a legend of one line above the axes: (label, colour) patches, then (label, colour, marker) points."""
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


def plain(text: str) -> str:
    """Escape control characters in a user's text, and dollar signs, which would start a formula in matplotlib."""
    return printable(text).replace("$", r"\$")


def shorten(text: str, max_length: int = 22) -> str:
    """Cut a class name to fit beside an axis, and escape it."""
    return plain(text if len(text) <= max_length else f"{text[: max_length - 1]}…")


def fonts_for(text: str) -> tuple[list[str], str]:
    """Which fonts have the characters of a text.

    Returns:
        The families for matplotlib, its own first and then as many fonts of this machine as are needed; and the
        characters that no font has, which are drawn as boxes.
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    family = FontProperties().get_name()
    missing = {each for each in set(text) if each.isprintable()} - _characters(get_font(findfont(FontProperties())))
    families = [family]
    for name, path in _fonts() if missing else ():
        try:
            found = missing & _characters(get_font(path))
        except (OSError, RuntimeError):  # a font that was removed, or one that FreeType cannot read
            continue
        if found:
            families.append(name)
            missing -= found
        if not missing:
            break
    return families, "".join(sorted(missing))


def png(figure: Any) -> bytes:
    """Render a figure as a PNG file. Names in any script are drawn where this machine has a font for them."""
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    families, _ = fonts_for("".join(each.get_text() for each in texts))
    for each in texts if len(families) > 1 else ():
        each.set_fontfamily(families)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _characters(font: Any) -> set[str]:
    return {chr(number) for number in font.get_charmap()}


def _fonts() -> list[tuple[str, str]]:
    """(family, file) of the fonts of this machine: upright, not bold, those for many scripts first.

    matplotlib's own fonts for formulas are left out, which have other glyphs than their code points say, and so is its
    font of boxes.
    """
    from matplotlib.font_manager import fontManager

    fonts = {
        each.name: each.fname
        for each in fontManager.ttflist
        if each.style == "normal"
        and each.weight in (400, "normal", "regular", "book", "medium")
        and not each.name.startswith(("Last Resort", "cm", "STIXNonUnicode", "STIXSize"))
    }
    return sorted(fonts.items(), key=lambda font: ("CJK" not in font[0], not font[0].startswith("Noto"), font[0]))
