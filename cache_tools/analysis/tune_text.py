"""`cache-tools tune-fusion` on a terminal: the surface, the settings compared, and the options to use."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import numpy as np

from cache_tools.analysis.stats_text import new_table, number, percent
from cache_tools.analysis.tune import TuneResult
from cache_tools.analysis.tune_shares import ShareResult
from cache_tools.console import print_line
from cache_tools.errors import printable
from cache_tools.screen import TextTable

_SURFACE_ROWS, _SURFACE_COLUMNS = 11, 9


def print_tuning(result: TuneResult) -> None:
    """Print a part of the surface, the settings compared, and the options to use."""
    print(heading(result))
    for table in (_surface(result), _settings(result)):
        print(f"\n{table.text()}")
    print()
    for line in _notes(result):
        print_line(line)
    cache = shlex.quote(result.path)
    print(f"Options for the build of another cache:\n  {result.build_options}")
    print("With this cache, fuse while you train or make a fused cache:")
    print_line(f"next: train-student --cache {cache} {result.train_options}")
    print_line(f"next: cache-tools fuse {cache} {result.train_options}")


def print_shares(result: ShareResult) -> None:
    """Print the settings compared, and the options to use."""
    print(heading(result))
    titles = ("shares", "NLL, chosen on", "NLL, held out", "− as built", "top-1", "ECE")
    table = new_table("setting, figures on held-out samples", titles)
    for setting in result.settings:
        table.add_row(
            setting.name,
            ", ".join(f"{share:.3g}" for share in setting.shares),
            number(setting.nll_chosen_on),
            f"{setting.nll:.4f} ± {setting.nll_error:.4f}",
            f"{setting.difference:+.4f} ± {setting.difference_error:.4f}",
            percent(setting.top1),
            number(setting.ece),
        )
    print(f"\n{table.text()}\n")
    print_line(f"{len(result.tried)} mixes tried. ±: standard error over samples; ECE in 15 bins.")
    cache = shlex.quote(result.path)
    print(f"Options for the build of another cache:\n  {result.build_options}")
    print("With this cache, fuse while you train or make a fused cache:")
    print_line(f"next: train-student --cache {cache} {result.train_options}")
    print_line(f"next: cache-tools fuse {cache} {result.fuse_options}")


def heading(result: TuneResult | ShareResult) -> str:
    views = f"view {result.views[0]}" if len(result.views) == 1 else f"{len(result.views)} views"
    dataset = printable(result.dataset)
    return (
        f"{dataset}, cache {result.fingerprint[:12]}: chosen on {result.samples_chosen_on:,} samples, "
        f"{result.samples_held_out:,} held out (seed {result.seed}), × {views}; temperature {result.temperature:g}"
    )


def _surface(result: TuneResult) -> TextTable:
    """Some rows and columns of the grid: the best, the named ones, and evenly spaced ones."""
    row = result.weights.index(result.chosen_weight)
    column = [scale.value for scale in result.scales].index(result.chosen_scale.value)
    named = [place for place, scale in enumerate(result.scales) if scale.name or scale.value == 1.0]
    rows = _choose_positions(len(result.weights), _SURFACE_ROWS, [row])
    columns = _choose_positions(len(result.scales), _SURFACE_COLUMNS, [column, *named])
    titles = [f"{result.scales[place].value:.4g}" for place in columns]
    titles = [
        f"{title} {result.scales[place].name or ''}".strip() for title, place in zip(titles, columns, strict=True)
    ]
    table = new_table("NLL: teacher weight ↓, CLIP scale →", titles)
    for place in rows:
        cells = [f"{result.nll[place][other]:.4f}" for other in columns]
        cells = [
            f"{cell}*" if (place, other) == (row, column) else cell for cell, other in zip(cells, columns, strict=True)
        ]
        table.add_row(f"{result.weights[place]:g}", *cells)
    return table


def _settings(result: TuneResult) -> TextTable:
    titles = ("teacher weight", "CLIP scale", "NLL, chosen on", "NLL, held out", "− as built", "top-1", "ECE")
    table = new_table("setting, figures on held-out samples", titles)
    for setting in result.settings:
        table.add_row(
            setting.name,
            "–" if setting.teacher_weight is None else f"{setting.teacher_weight:g}",
            "–" if setting.clip_scale is None else f"{setting.clip_scale:.4g}",
            number(setting.nll_chosen_on),
            f"{setting.nll:.4f} ± {setting.nll_error:.4f}",
            f"{setting.difference:+.4f} ± {setting.difference_error:.4f}",
            percent(setting.top1),
            number(setting.ece),
        )
    return table


def _notes(result: TuneResult) -> list[str]:
    notes = ["±: standard error over samples; ECE in 15 bins; * the choice."]
    if result.chosen_weight == 1.0:
        notes.append("The teacher alone is best: CLIP adds nothing to its likelihood here.")
    if result.at_edge:
        notes.append("The best scale is at the edge of those tried: widen --scales.")
    if result.dataset.partition("/")[2].startswith("train"):
        notes.append(
            "If the teacher was trained on these images, its NLL is too good and its weight too high: "
            "choose on images it has not seen, such as a cache of --set dataset.split='train[50000:]'."
        )
    return notes


def _choose_positions(count: int, most: int, wanted: Sequence[int]) -> list[int]:
    """Choose about `most` of `count` positions: the wanted ones, both ends, and evenly spaced ones."""
    wanted = sorted({*wanted, 0, count - 1})
    even = np.linspace(0, count - 1, max(most - len(wanted), 0) + 2)[1:-1].round().astype(int).tolist()
    return sorted({*wanted, *even})
