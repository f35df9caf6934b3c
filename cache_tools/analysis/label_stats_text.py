"""`cache-tools stats` on a terminal, for images with any number of labels: the tables of a `LabelStats`, with notes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import polars as pl

from cache_tools.analysis.label_stats import LabelStats
from cache_tools.analysis.stats_text import new_table, number, percent, points
from cache_tools.console import print_line
from cache_tools.errors import printable
from cache_tools.plotting import LABELS
from cache_tools.screen import TextTable

_MOST_CLASSES, _MOST_VIEWS, _TOP_ROWS = 24, 8, 10


def print_label_stats(stats: LabelStats) -> None:
    """Print the heading, every table and the notes."""
    about = stats.about
    views = f"view {about.views[0]}" if len(about.views) == 1 else f"{len(about.views)} views"
    print_line(
        f"{printable(about.dataset)}, cache {about.fingerprint[:12]}: {about.num_samples:,} samples × {views}, "
        f"{len(about.class_names)} labels"
    )
    print_line(f"sigmoid at temperature {about.temperature:g}; confident: probability ≥ {about.confident:g}")
    for table in _tables(stats):
        print(f"\n{table.text()}")
    print()
    for line in _notes(stats):
        print_line(line)


def _tables(stats: LabelStats) -> Iterable[TextTable]:
    yield _overall(stats)
    if len(stats.about.views) > 1:
        yield _by_view(stats)
    yield _reliability(stats)
    yield _classes(stats)
    if not stats.suspicious.is_empty():
        yield _suspicious(stats)


def _overall(stats: LabelStats) -> TextTable:
    rows: dict[str, tuple[str, Callable[[Any], str]]] = {
        "map": ("mAP", percent),
        "bce": ("BCE, nats", number),
        "ece": ("ECE, 15 bins", number),
        "labels": ("labels per image", lambda value: number(value, 2)),
        "given": ("labels of p ≥ 0.5 per image", lambda value: number(value, 2)),
        "wrong": ("wrong decisions", percent),
        "confident_wrong": (f"confident (≥ {stats.about.confident:g}) and wrong", percent),
    }
    (overall,) = stats.summary.filter(pl.col("view").is_null()).to_dicts()
    views = "over all views" if len(stats.about.views) > 1 else f"view {stats.about.views[0]}"
    table = new_table(views, [LABELS[stats.about.main]])
    for key, (name, show) in rows.items():
        table.add_row(name, show(overall[key]))
    return table


def _by_view(stats: LabelStats) -> TextTable:
    table = new_table("view", ["mAP", "BCE", "ECE", "wrong", "confident and wrong"])
    shown = stats.about.views[:_MOST_VIEWS]
    for row in stats.summary.filter(pl.col("view").is_in(shown)).to_dicts():
        shares = (percent(row["wrong"]), percent(row["confident_wrong"]))
        table.add_row(str(row["view"]), percent(row["map"]), number(row["bce"]), number(row["ece"]), *shares)
    if len(shown) < len(stats.about.views):
        table.add_row(f"… {len(stats.about.views) - len(shown)} more views in --json")
    return table


def _reliability(stats: LabelStats) -> TextTable:
    table = new_table("probability", ["share %", "has the label %", "gap"])
    total = int(stats.reliability["n"].sum())
    for row in stats.reliability.filter(pl.col("n") > 0).to_dicts():
        cells = (percent(row["n"] / total, ""), percent(row["has"], ""), points(row["has"] - row["probability"]))
        table.add_row(f"{row['low']:.2f}–{row['high']:.2f}", *cells)
    return table


def _classes(stats: LabelStats) -> TextTable:
    rows = stats.classes.sort("average_precision", descending=True, nulls_last=True)
    half = _MOST_CLASSES // 2
    pieces = [rows] if len(rows) <= _MOST_CLASSES else [rows.head(half), rows.tail(half)]
    table = new_table("label", ["images", "AP", "precision", "recall", "p with it", "p without"])
    for place, piece in enumerate(pieces):
        if place:
            table.add_row(f"… {len(rows) - 2 * half} more in --json")
        for row in piece.to_dicts():
            shares = [percent(row[name]) for name in ("average_precision", "precision", "recall")]
            table.add_row(row["class"], f"{row['n']:,}", *shares, number(row["with"], 3), number(row["without"], 3))
    return table


def _suspicious(stats: LabelStats) -> TextTable:
    views = len(stats.about.views)
    table = new_table("suspicious sample", ["label", "in the table", "mean p", "against in views"])
    for row in stats.suspicious.head(_TOP_ROWS).to_dicts():
        has = "yes" if row["has"] else "no"
        against = f"{row['views_against']} of {views}"
        table.add_row(str(row["sample"]), row["class"], has, number(row["probability"], 3), against)
    return table


def _notes(stats: LabelStats) -> list[str]:
    about = stats.about
    notes = [
        "decision: whether an image has a label, at p ≥ 0.5; AP: average precision; gap: share minus mean p, in points."
    ]
    if len(about.views) < about.num_views:
        notes.append(f"{len(about.views)} of the cache's {about.num_views} views were analysed.")
    if about.dataset.partition("/")[2].startswith("train"):
        notes.append(
            "These are training images: a teacher that was trained on them looks better here than on new images."
        )
    return notes
