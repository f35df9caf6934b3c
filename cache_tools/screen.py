"""Text for the screen: tables that fit it, and figures in a fixed number of digits."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence

from cache_tools.errors import printable

_USUAL_WIDTH = 80
_INDENT = "  "


def screen_width(piped: int = _USUAL_WIDTH) -> int:
    """The number of columns of the terminal, or $COLUMNS. Where the output is no terminal: `piped`."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    if not sys.stdout.isatty():
        return piped
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or _USUAL_WIDTH
    except (OSError, ValueError):
        return _USUAL_WIDTH


class TextTable:
    """A table without borders: names at the left, figures right-aligned. Nothing in it is ever cut.

    Where it is too wide, titles are wrapped; if that is not enough, a row becomes several lines, the name first.

    Args:
        titles: of the columns.
        names: number of columns, the first ones, that hold names.
        left: number of columns that are aligned at the left; None for the names.
        title: a line above the table.
    """

    def __init__(self, titles: Sequence[str], *, names: int = 1, left: int | None = None, title: str = "") -> None:
        self.titles, self.names, self.title = [printable(text) for text in titles], names, printable(title)
        self.left = names if left is None else left
        self.rows: list[list[str]] = []

    def add_row(self, *cells: str) -> None:
        """Add a row; cells that are not given are empty."""
        self.rows.append([printable(cell) for cell in cells] + [""] * (len(self.titles) - len(cells)))

    def fits(self, width: int) -> bool:
        """Whether every row is one line, below titles of one line."""
        return _widest(self._flat([[title] for title in self.titles], "  ")) <= width

    def text(self, width: int | None = None) -> str:
        """The table in at most `width` columns, unless a name or a figure is wider; None for the screen's width."""
        width = screen_width() if width is None else width
        heads: list[list[str]] = [[title] for title in self.titles]
        lines = self._flat(heads, "  ")
        for gap in ("  ", " "):
            if _widest(lines) <= width:
                break
            heads = [_wrapped(title, self._narrowest(place)) for place, title in enumerate(self.titles)]
            lines = self._flat(heads, gap)
        if _widest(lines) > width:
            lines = self._stacked(width)
        return "\n".join([*([self.title] if self.title else []), *lines])

    def _narrowest(self, place: int) -> int:
        """The width of a column whose title is wrapped."""
        cells = [row[place] for row in self.rows] + self.titles[place].split()
        return max(1, *map(_length, cells)) if cells else 1

    def _flat(self, heads: Sequence[Sequence[str]], gap: str) -> list[str]:
        """One line per row below titles of one or several lines."""
        height = max(map(len, heads))
        lines = [[*[""] * (height - len(head)), *head] for head in heads]
        table = [[head[line] for head in lines] for line in range(height)] + self.rows
        widths = [max(_length(row[place]) for row in table) for place in range(len(self.titles))]
        return [gap.join(self._padded(row, widths)).rstrip() for row in table]

    def _stacked(self, width: int) -> list[str]:
        """The names of a row on its first line, the figures below them in as many lines as are needed."""
        table = [self.titles, *self.rows]
        widths = [max(_length(row[place]) for row in table) for place in range(len(self.titles))]
        groups: list[list[int]] = [[]]
        for place in range(self.names, len(self.titles)):
            used = sum(widths[other] + 2 for other in groups[-1])
            if groups[-1] and len(_INDENT) + used + widths[place] > width:
                groups.append([])
            groups[-1].append(place)
        lines = []
        for row in table:
            names = "  ".join(cell for cell in row[: self.names] if cell)
            lines += _wrapped(names, width)
            padded = self._padded(row, widths)
            below = [_INDENT + "  ".join(padded[place] for place in group) for group in groups]
            lines += [line.rstrip() for line in below if line.strip()]
        return lines

    def _padded(self, row: Sequence[str], widths: Sequence[int]) -> list[str]:
        return [
            cell + " " * (size - _length(cell)) if place < self.left else " " * (size - _length(cell)) + cell
            for place, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]


def nats(value: float | None) -> str:
    """A likelihood or a loss: four decimals, or three digits of a huge one, as of a student that diverged."""
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.2e}"


def count(number: int | None) -> str:
    """A large number in three digits: `78.0 k`, `3.92 M`."""
    if number is None:
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g} {unit}".replace(". ", " ")
    return str(number)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def _widest(lines: Iterable[str]) -> int:
    return max(map(_length, lines), default=0)


def _length(text: str) -> int:
    """Columns on the screen: characters of East Asian scripts take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
