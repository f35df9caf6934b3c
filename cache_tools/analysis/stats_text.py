"""`cache-tools stats` on a terminal: the tables of a `TeacherStats`, with notes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import polars as pl

from cache_tools.analysis.stats import About, TeacherStats
from cache_tools.console import print_line
from cache_tools.errors import printable
from cache_tools.plotting import LABELS
from cache_tools.screen import TextTable

_MOST_CLASSES, _MOST_VIEWS, _TOP_ROWS = 24, 8, 10

_PERCENT = ("top1", "top5", "confidence", "confident_right", "unsure_right", "unsure_wrong", "confident_wrong")


def print_stats(stats: TeacherStats) -> None:
    """Print the heading, every table and the notes."""
    print(heading(stats.about))
    for table in _tables(stats):
        print(f"\n{table.text()}")
    print()
    for line in _notes(stats):
        print_line(line)


def heading(about: About) -> str:
    """The cache and the settings, in a few lines."""
    confident = f"softmax at temperature {about.temperature:g}; confident: probability ≥ {about.confident:g}"
    return "\n".join([data_line(about), targets_line(about), confident, *fused_note(about)])


def data_line(about: About) -> str:
    """The data, the cache and the analysed views."""
    views = f"view {about.views[0]}" if len(about.views) == 1 else f"{len(about.views)} views"
    return (
        f"{printable(about.dataset)}, cache {about.fingerprint[:12]}: {about.num_samples:,} samples × {views}, "
        f"{len(about.class_names)} classes"
    )


def fused_note(about: About) -> list[str]:
    """A line for a cache that does not have teacher and CLIP separately; empty for others."""
    if about.sources != ("fusion",):
        return []
    return [
        "This cache has the fusion only (store: fused), not teacher and CLIP separately; "
        "build one with --set store=components to compare them."
    ]


def targets_line(about: About) -> str:
    """What students learn from: the fusion, or one group alone."""
    scales = " and ".join(f"{scale:g}" for scale in about.clip_scales)
    clip = f"CLIP's logits: {scales} · cosine"
    if about.prompt_ensemble != "embedding":
        clip += f", averaged over prompts as {about.prompt_ensemble}"
    if about.main == "teacher":
        return "targets: the teacher alone, no CLIP"
    if about.main == "clip":
        return f"targets: CLIP alone, no teacher; {clip}"
    weight = about.teacher_weight or 0.0
    return f"fusion: {weight:g} · teacher + {1 - weight:g} · CLIP, {clip}"


def _tables(stats: TeacherStats) -> Iterable[TextTable]:
    yield _overall(stats)
    if len(stats.about.views) > 1:
        yield _by_view(stats)
    yield _reliability(stats)
    yield from _classes(stats)
    if not stats.disagreement.is_empty():
        yield _disagreement(stats)
    if not stats.mixed.is_empty():
        yield _mixed(stats)
    yield _confusions(stats)
    yield _suspicious(stats)


def _overall(stats: TeacherStats) -> TextTable:
    """One row per figure, one column per source."""
    at_least = f"≥ {stats.about.confident:g}"
    rows = {
        "top1": "top-1",
        "top5": "top-5",
        "nll": "NLL, nats",
        "brier": "Brier score",
        "ece": "ECE, 15 bins",
        "confidence": "mean confidence",
        "entropy": "mean entropy, nats",
        "confident_right": f"confident ({at_least}) and right",
        "unsure_right": "unsure and right",
        "unsure_wrong": "unsure and wrong",
        "confident_wrong": f"confident ({at_least}) and wrong",
        "consistency": "non-target consistency",
    }
    overall = {row["source"]: row for row in stats.summary.filter(pl.col("view").is_null()).to_dicts()}
    sources = stats.about.sources
    views = "over all views" if len(stats.about.views) > 1 else f"view {stats.about.views[0]}"
    table = new_table(views, [LABELS[source] for source in sources])
    for key, name in rows.items():
        show = percent if key in _PERCENT else number
        if any(overall[source][key] is not None for source in sources):
            table.add_row(name, *[show(overall[source][key]) for source in sources])
    stability = {row["source"]: row for row in stats.stability.to_dicts()}
    if stability:
        table.add_row("same top-1 in all views", *[percent(stability[source]["same_top1"]) for source in sources])
        table.add_row("JS divergence of the views", *[number(stability[source]["divergence"]) for source in sources])
    return table


def _by_view(stats: TeacherStats) -> TextTable:
    """One row per view and source."""
    at_least = f"≥ {stats.about.confident:g}"
    figures: dict[str, tuple[str, Callable[[Any], str]]] = {
        "top1": ("top-1", percent),
        "nll": ("NLL", number),
        "ece": ("ECE", number),
        "confident_right": (f"confident ({at_least}), right", percent),
        "unsure_right": ("unsure, right", percent),
        "unsure_wrong": ("unsure, wrong", percent),
        "confident_wrong": (f"confident ({at_least}), wrong", percent),
    }
    table = new_table("view", [name for name, _ in figures.values()])
    shown = stats.about.views[:_MOST_VIEWS]
    for row in stats.summary.filter(pl.col("view").is_in(shown)).sort("view", maintain_order=True).to_dicts():
        view = f"{row['view']} {LABELS[row['source']]}"
        table.add_row(view, *[show(row[key]) for key, (_, show) in figures.items()])
    if len(shown) < len(stats.about.views):
        table.add_row(f"… {len(stats.about.views) - len(shown)} more views in --json")
    return table


def _reliability(stats: TeacherStats) -> TextTable:
    """Empty bins are left out; the gap is accuracy minus mean confidence, in points."""
    sources = stats.about.sources
    table = new_table("bin", [f"{LABELS[s]} {name}" for s in sources for name in ("share %", "top-1 %", "gap")])
    overall = stats.reliability.filter(pl.col("view").is_null())
    total = int(overall.filter(pl.col("source") == stats.about.main)["n"].sum())
    for rows in overall.partition_by("bin", maintain_order=True):
        if not rows["n"].sum():
            continue
        by_source = {row["source"]: row for row in rows.to_dicts()}
        cells = []
        for row in (by_source[source] for source in sources):
            gap = points(row["accuracy"] - row["confidence"]) if row["n"] else "–"
            cells += [percent(row["n"] / total, ""), percent(row["accuracy"], ""), gap]
        table.add_row(f"{rows['low'][0]:.2f}–{rows['high'][0]:.2f}", *cells)
    return table


def _classes(stats: TeacherStats) -> Iterable[TextTable]:
    """Accuracies, then consistencies, of all classes or of those with the largest and smallest gains."""
    sources = stats.about.sources
    others, rows = sources[:-1], stats.classes_by_gain()
    half = _MOST_CLASSES // 2
    pieces = [rows] if len(rows) <= _MOST_CLASSES else [rows.head(half), rows.tail(half)]
    titles = ["samples", *[f"{LABELS[s]} top-1" for s in sources], *[f"gain over {LABELS[s]}" for s in others]]
    accuracy = new_table("class", titles)
    consistency = new_table("class: non-target consistency", [LABELS[s] for s in sources])
    for place, piece in enumerate(pieces):
        if place:
            for table in (accuracy, consistency):
                table.add_row(f"… {len(rows) - 2 * half} more in --json")
        for row in piece.to_dicts():
            shares = [percent(row[f"{s}_accuracy"]) for s in sources]
            accuracy.add_row(row["class"], f"{row['n']:,}", *shares, *[points(row[f"gain_over_{s}"]) for s in others])
            consistency.add_row(row["class"], *[number(row[f"{s}_consistency"], 3) for s in sources])
    return [accuracy, consistency] if len(stats.about.class_names) > 2 else [accuracy]


def _disagreement(stats: TeacherStats) -> TextTable:
    row = stats.disagreement.filter(pl.col("view").is_null()).to_dicts()[0]
    table = new_table("teacher and CLIP", ["share"])
    lines = {
        "differ": "different top-1",
        "differ_teacher_right": "  of these: teacher right",
        "differ_clip_right": "  of these: CLIP right",
        "differ_neither_right": "  of these: neither right",
        "differ_fusion_with_teacher": "  of these: fusion sides with the teacher",
        "differ_fusion_with_clip": "  of these: fusion sides with CLIP",
        "fusion_corrects_teacher": "fusion right where the teacher is wrong",
        "fusion_spoils_teacher": "fusion wrong where the teacher is right",
        "fusion_corrects_clip": "fusion right where CLIP is wrong",
        "fusion_spoils_clip": "fusion wrong where CLIP is right",
    }
    for key, name in lines.items():
        table.add_row(name, percent(row[key]))
    table.add_row("mean JS divergence, nats (at most 0.693)", number(row["divergence"]))
    return table


def _mixed(stats: TeacherStats) -> TextTable:
    """Linearly mixed labels against the targets of the mixed pictures, one column per source."""
    overall = {row["source"]: row for row in stats.mixed.filter(pl.col("view").is_null()).to_dicts()}
    sources = stats.about.sources
    table = new_table("mixed labels against targets", [LABELS[source] for source in sources])
    lines: dict[str, tuple[str, Callable[[Any], str]]] = {
        "kl": ("KL of mixed labels from targets, nats", number),
        "distance": ("distance of the two (0 to 1)", number),
        "top1": ("top-1 is the larger label", percent),
        "in_pair": ("top-1 is one of the two labels", percent),
        "label_mass": ("probability of the two labels", percent),
    }
    for key, (name, show) in lines.items():
        table.add_row(name, *[show(overall[source][key]) for source in sources])
    return table


def _confusions(stats: TeacherStats) -> TextTable:
    sources = stats.about.sources
    table = new_table("label → wrong prediction, share of the label", [f"{LABELS[s]}" for s in sources])
    for row in stats.confusions.head(_TOP_ROWS).to_dicts():
        shares = [percent(row[f"{s}_share"]) for s in sources]
        table.add_row(f"{row['class']} → {row['said_class']}", *shares)
    return table


def _suspicious(stats: TeacherStats) -> TextTable:
    views = len(stats.about.views)
    says = f"{LABELS[stats.about.main]} says"
    table = new_table("suspicious sample", ["label", says, "mean p", "top-1 in views"])
    for row in stats.suspicious(_TOP_ROWS).to_dicts():
        figures = (number(row["against"], 3), f"{row['views_against']} of {views}")
        table.add_row(str(row["sample"]), row["class"], row["rival_class"], *figures)
    return table


def _notes(stats: TeacherStats) -> list[str]:
    about = stats.about
    notes = ["bin: of the confidence; gap: top-1 minus mean confidence, in points; gain: in points of top-1."]
    if len(about.views) < about.num_views:
        notes.append(f"{len(about.views)} of the cache's {about.num_views} views were analysed.")
    if not stats.mixed.is_empty():
        notes.append(
            "Views that mix two images: the figures of labels and classes take the label of a sample, which is only a "
            "part of the picture; those of mixed labels take both."
        )
    if len(about.views) == 1:
        notes.append("Stability needs two views or more.")
    if about.dataset.partition("/")[2].startswith("train") and about.main != "clip":
        notes.append(
            "These are training images: a teacher that was trained on them looks better here than on new images."
        )
    return notes


def new_table(first: str, others: Sequence[str]) -> TextTable:
    """An empty table: names left, figures right."""
    return TextTable([first, *others])


def percent(value: Any, unit: str = " %") -> str:
    return "–" if value is None else f"{100 * value:.2f}{unit}"


def points(value: Any) -> str:
    return "–" if value is None else f"{100 * value:+.2f}"


def number(value: Any, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
