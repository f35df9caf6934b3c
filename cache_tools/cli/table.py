"""The table of `cache-tools ls`."""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from datetime import datetime

from cache_tools.console import print_line
from cache_tools.home.listing import RemoteRecord
from cache_tools.home.registry import CacheRecord
from cache_tools.screen import TextTable, screen_width
from cache_tools.units import human_bytes

_PIPED_WIDTH = 400  # for grep and awk: a line per cache


def print_table(records: Sequence[CacheRecord] | Sequence[RemoteRecord]) -> None:
    """Print the caches, then the problems of those that cannot be opened.

    A line per cache where the screen is wide enough, if need be without CLIP and the time of the last write. Otherwise
    a cache takes several lines.
    """
    width = screen_width(_PIPED_WIDTH)
    whole = _table(records)
    small = _table(records, left_out={"CLIP", "modified"})
    print((small if small.fits(width) and not whole.fits(width) else whole).text(width))
    for record in records:
        if record.problem:
            print_line(f"{record.name} {'cannot be opened' if record.unknown else 'is damaged'}: {record.problem}")


def _table(records: Sequence[CacheRecord] | Sequence[RemoteRecord], left_out: Set[str] = frozenset()) -> TextTable:
    rows = []
    for record in records:
        row = {"name": record.name, "fingerprint": record.fingerprint[:12], "dataset": record.dataset}
        row |= {"teacher": record.teacher, "CLIP": record.clip, "views": _views(record)}
        row |= {"size": human_bytes(record.size_bytes), "modified": _date(record.modified_s)}
        if isinstance(record, CacheRecord):
            row["used"] = _age(time.time() - record.used_s)
        rows.append({title: cell for title, cell in row.items() if title not in left_out})
    titles = list(rows[0])
    table = TextTable(titles, left=titles.index("views"))
    for row in rows:
        table.add_row(*row.values())
    return table


def _date(time_s: float) -> str:
    """Local time; empty if the year is out of range."""
    try:
        return datetime.fromtimestamp(time_s).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):
        return ""


def _age(seconds: float) -> str:
    """`40 min`, `3 h`, `12 d` ago; `now` within a minute."""
    minutes = seconds / 60
    if minutes < 1:
        return "now"
    return (
        f"{minutes:.0f} min"
        if minutes < 99.5
        else f"{minutes / 60:.0f} h"
        if minutes < 2880
        else f"{minutes / 1440:.0f} d"
    )


def _views(record: CacheRecord | RemoteRecord) -> str:
    if record.problem:
        return "unknown" if record.unknown else "damaged"
    staged = " staged" if isinstance(record, CacheRecord) and record.origin is not None and not record.complete else ""
    dropped = f", {record.views_dropped} dropped" if record.views_dropped else ""
    return f"{record.views_done}/{record.views_total}{staged}{dropped}"
