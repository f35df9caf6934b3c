"""The contact sheet of `cache-tools show`: pictures of samples with what each source says, as PNG or HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache_tools.analysis.samples import Opinion, Shown, ShownSample, ShownView
from cache_tools.analysis.samples_text import (
    RIGHT,
    WRONG,
    about_lines,
    cut,
    cut_file,
    figure_text,
    gains,
    notes,
    title,
    view_lines,
)
from cache_tools.analysis.sheet_page import MAX_PAGE_BYTES, SMALL, render_sheet
from cache_tools.analysis.stats import make_folder, put_file
from cache_tools.analysis.stats_text import points
from cache_tools.errors import RecipeError, printable
from cache_tools.files import SafeFolder
from cache_tools.plotting import COLOURS, DARK_GREY, GREEN, INK, LABELS, VERMILLION, fonts_for, new_canvas, plain, png

__all__ = ["MAX_PAGE_BYTES", "draw_sheet", "render_sheet", "write_sheet"]

# Of the PNG, in inches.
_MARGIN, _PICTURE, _SOURCE, _GAP, _LINE, _BAR, _NUMBER = 0.25, 1.05, 1.3, 0.12, 0.18, 0.165, 0.3
_HEADING = 0.085  # of a letter
_ROW = 2 * _LINE + 5 * _BAR + 0.34


def write_sheet(shown: Shown, out: Path) -> None:
    """Write a PNG or an HTML page, by the ending of `out`, and its folder if there is none.

    Raises:
        RecipeError: another ending, or names so long that no page below MAX_PAGE_BYTES holds them.
        StorageError: a folder is in the way, or the disk is full or read-only.
    """
    suffix = out.suffix.lower()
    if suffix not in (".png", ".html"):
        raise RecipeError("a sheet is PNG or HTML", expected="a file that ends in .png or .html", found=out)
    make_folder(out.parent)
    data = png(draw_sheet(shown)) if suffix == ".png" else render_sheet(shown).encode()
    folder = SafeFolder(out.parent)
    folder.remove_partials()  # of killed commands
    put_file(folder, out.name, data)


def draw_sheet(shown: Shown) -> Any:
    """A matplotlib figure: a row per sample, a column per view, a block of five bars per source."""
    names, sources = shown.about.class_names, shown.sources
    cell = _PICTURE + _GAP + len(sources) * (_SOURCE + _GAP) + _GAP
    lines = [*about_lines(shown), *(f"{head}: {_gains_line(rows)}" for head, rows in gains(shown))]
    lines += notes(shown, of_mean=False)
    drawn = "".join([*names, *(sample.name or "" for sample in shown.samples), shown.about.dataset])
    if missing := fonts_for(printable(drawn))[1]:
        others = "" if len(missing) == 1 else f" and {len(missing) - 1} others"
        lines.append(f"No font here has the character U+{ord(missing[0]):04X}{others}, shown as boxes.")
    top = _MARGIN + 0.42 + _LINE * len(lines) + 0.15
    width = max(2 * _MARGIN + len(shown.views) * cell, 9.0)
    figure, axes = new_canvas(width, top + _ROW * len(shown.samples) + _MARGIN)
    axes.text(_MARGIN, _MARGIN, plain(title(shown)), va="top", fontsize=14, fontweight="bold", color=INK)
    for number, line in enumerate(lines):
        axes.text(_MARGIN, _MARGIN + 0.4 + _LINE * number, plain(line), va="top", fontsize=8.5, color=DARK_GREY)
    for number, sample in enumerate(shown.samples):
        y = top + _ROW * number
        axes.plot((_MARGIN, width - _MARGIN), (y - 0.08, y - 0.08), color=DARK_GREY, linewidth=0.4)
        axes.text(_MARGIN, y, plain(_heading(shown, sample, width)), va="top", fontsize=9, fontweight="bold", color=INK)
        for place, view in enumerate(sample.views):
            _draw_view(axes, _MARGIN + place * cell, y + _LINE + 0.03, sample, view, names)
    axes.set(xlim=(0, width), ylim=(figure.get_figheight(), 0))
    axes.set_aspect("auto")
    return figure


def _draw_view(axes: Any, x: float, y: float, sample: ShownSample, view: ShownView, names: Sequence[str]) -> None:
    height, width = view.pixels.shape[:2]
    scale = _PICTURE / max(height, width)
    right, bottom = x + width * scale, y + height * scale
    smooth = "antialiased" if max(height, width) > SMALL else "nearest"
    axes.imshow(view.pixels, extent=(x, right, bottom, y), interpolation=smooth, aspect="auto")
    about = ", ".join([f"view {view.view}", *view_lines(view)])
    axes.text(x, bottom + 0.03, plain(about), va="top", fontsize=6.5, color=DARK_GREY)
    for place, (source, opinion) in enumerate(view.opinions.items()):
        left = x + _PICTURE + _GAP + place * (_SOURCE + _GAP)
        _draw_opinion(axes, left, y, source, opinion, sample.label, names)


def _draw_opinion(
    axes: Any, x: float, y: float, source: str, opinion: Opinion, label: int, names: Sequence[str]
) -> None:
    from matplotlib.patches import Rectangle

    mark, colour = (RIGHT, GREEN) if opinion.right else (WRONG, VERMILLION)
    axes.add_patch(Rectangle((x, y + 0.03), 0.09, 0.09, color=COLOURS[source], linewidth=0))
    axes.text(x + 0.13, y, LABELS[source], va="top", fontsize=7.5, color=INK)
    axes.text(x + _SOURCE, y, mark, va="top", ha="right", fontsize=8.5, color=colour, fontweight="bold")
    for rank, (number, p) in enumerate(opinion.top):
        top = y + _LINE + rank * _BAR
        axes.add_patch(
            Rectangle((x, top), max(p, 0.003) * _SOURCE, _BAR * 0.84, color=COLOURS[source], alpha=0.32, linewidth=0)
        )
        style = {"va": "center", "fontsize": 7, "color": INK, "fontweight": "bold" if number == label else "normal"}
        middle = top + _BAR * 0.42
        name = axes.text(x + 0.03, middle, plain(cut(names[number], 13 if number == label else 15)), **style)
        name.set_clip_path(Rectangle((x, top), _SOURCE - _NUMBER, _BAR, transform=axes.transData))
        axes.text(x + _SOURCE, middle, f"{p:.2f}", ha="right", **style)


def _heading(shown: Shown, sample: ShownSample, width: float) -> str:
    """Number, label, figure and file of a sample, on a sheet of `width` inches."""
    parts = [f"sample {sample.sample}", f"label: {cut(shown.about.class_names[sample.label], 24)}"]
    if (figure := figure_text(shown, sample)) is not None:
        parts.append(figure)
    if sample.name is not None:
        left = int((width - 2 * _MARGIN) / _HEADING) - sum(len(part) + 3 for part in parts)
        parts.append(cut_file(sample.name, max(left, 12)))
    return " · ".join(parts)


def _gains_line(rows: Any) -> str:
    each = ", ".join(f"{cut(row['class'], 24)} {points(row['gain_over_teacher'])}" for row in rows.to_dicts())
    return f"{each} (points of top-1 over the teacher)"
