"""`cache-tools show` in words: what a sheet is about, and its table on a terminal."""

from __future__ import annotations

import polars as pl

from cache_tools.analysis.samples import Opinion, Shown, ShownSample, ShownView
from cache_tools.analysis.stats_text import data_line, fused_note, new_table, points, targets_line
from cache_tools.console import print_line
from cache_tools.errors import printable
from cache_tools.plotting import LABELS
from cache_tools.screen import TextTable
from cache_tools.units import counted

# Of a class, of a file: at most so many characters in a table.
_CLASS, _FILE = 16, 28
RIGHT, WRONG = "✓", "✗"
# The name of the figure that a sample was chosen by.
FIGURES = {"disagree": "JS divergence", "confused": "entropy", "suspicious": "mean p"}


def print_samples(shown: Shown) -> None:
    """Print the heading, a row per sample, and the classes that the fusion helps and hurts most."""
    print(f"{title(shown)}\n" + "\n".join(about_lines(shown)))
    if shown.samples:
        print(f"\n{_table(shown).text()}")
    else:
        print("\nNo sample has a top-1 other than its label in any view.")
    for heading, rows in gains(shown):
        print(f"\n{_gains_table(heading, rows).text()}")
    print()
    for line in notes(shown, of_mean=True):
        print_line(line)


def title(shown: Shown) -> str:
    """What the samples have in common."""
    choice, main = shown.choice, _with_article(shown.about.sources[-1])
    titles = {
        "even": "Samples spread evenly over the classes",
        "samples": "Samples by number",
        "class": f"Samples of class {printable(choice.class_name or '')}",
        "disagree": "Where teacher and CLIP differ most",
        "confused": f"Where {main} is least certain",
        "suspicious": "Suspicious labels",
    }
    return titles[choice.order]


def definition(shown: Shown) -> str | None:
    """How samples are ranked; None for an order that is no ranking."""
    main = _with_article(shown.about.sources[-1])
    over = "" if len(shown.about.views) == 1 else f", mean over {len(shown.about.views)} views"
    definitions = {
        "disagree": f"by the JS divergence of teacher and CLIP in nats, from 0 to 0.693{over}",
        "confused": f"by the entropy of {main} in nats{over}",
        "suspicious": f"wrong in at least one view, by the probability p of one other class in {main}{over}",
    }
    return definitions.get(shown.choice.order)


def about_lines(shown: Shown) -> list[str]:
    """The data, the targets, the ranking, the views and the student, a line each."""
    about = shown.about
    views = f"{'view' if len(shown.views) == 1 else 'views'} {', '.join(map(str, shown.views))}"
    lines = [data_line(about), targets_line(about)]
    lines += [] if (ranked := definition(shown)) is None else [ranked]
    lines.append(f"{counted(len(shown.samples), 'sample')} in {views}; softmax at temperature {about.temperature:g}")
    if (student := shown.student) is not None:
        lines.append(f"student: {printable(student.name)}, from {printable(student.run)}")
    return [*lines, *fused_note(about)]


def gains(shown: Shown) -> list[tuple[str, pl.DataFrame]]:
    """(heading, classes) of what the fusion helps and hurts most; empty where nothing tells."""
    tables = (("classes that the fusion helps most", shown.helped), ("classes that the fusion hurts most", shown.hurt))
    return [(heading, rows) for heading, rows in tables if rows is not None and len(rows)]


def notes(shown: Shown, *, of_mean: bool) -> list[str]:
    """What readers must know to understand the figures; `of_mean` for those of the mean over the shown views."""
    what = "the mean over the shown views" if of_mean and len(shown.views) > 1 else "each view"
    found = [f"{RIGHT} right, {WRONG} wrong: whether the most probable class is the label, in {what}."]
    if any(view.partner is not None for sample in shown.samples for view in sample.views):
        found.append("Views that mix two images: the label of a sample is only a part of the picture.")
    if (shown.helped is not None) and not gains(shown):
        found.append("The fusion has the top-1 of the teacher in every class.")
    student = shown.student
    if student is not None and student.fingerprint not in (None, shown.about.fingerprint):
        found.append(f"The student learned from another cache, {printable(str(student.fingerprint)[:12])}.")
    if shown.about.dataset.partition("/")[2].startswith("train"):
        found.append("These are training images: networks that were trained on them look better here than elsewhere.")
    return found


def view_lines(view: ShownView) -> list[str]:
    """What is special about a view: its divergence, and the image that it mixes in."""
    lines = [] if view.divergence is None else [f"JS divergence {view.divergence:.3f}"]
    if view.partner is not None:
        lines.append(f"{view.share:.0%} of it; the rest is sample {view.partner}")
    return lines


def figure_text(shown: Shown, sample: ShownSample) -> str | None:
    """The figure that a sample was chosen by, with its name."""
    if sample.figure is None:
        return None
    name = FIGURES[shown.choice.order]
    if sample.suspicion is None:
        return f"{name} {sample.figure:.3f}"
    said = cut(str(sample.suspicion["rival_class"]), 24)
    views = f"{sample.suspicion['views_against']} of {counted(len(shown.about.views), 'view')}"
    return f"{LABELS[shown.about.sources[-1]]} says {said}: {name} {sample.figure:.3f}, top-1 in {views}"


def said(opinion: Opinion, names: tuple[str, ...], longest: int = _CLASS) -> str:
    """The top class of a source with its probability, and whether it is right."""
    number, p = opinion.top[0]
    return f"{RIGHT if opinion.right else WRONG} {cut(names[number], longest)} {p:.2f}"


def cut(text: str, longest: int) -> str:
    """The start of an escaped name."""
    text = printable(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def cut_file(text: str, longest: int = _FILE) -> str:
    """The end of an escaped path."""
    text = printable(text)
    return text if len(text) <= longest else f"…{text[1 - longest :]}"


def _table(shown: Shown) -> TextTable:
    names, has_files = shown.about.class_names, any(sample.name is not None for sample in shown.samples)
    figure = FIGURES.get(shown.choice.order)
    first = ["sample", *(["file"] if has_files else []), "label"]
    titles = [*first, *([figure] if figure else []), *[LABELS[source] for source in shown.sources]]
    table = TextTable(titles, names=len(first), left=len(titles))
    for sample in shown.samples:
        cells = [str(sample.sample), *([cut_file(sample.name or "")] if has_files else [])]
        cells.append(cut(names[sample.label], _CLASS))
        cells += [] if sample.figure is None else [f"{sample.figure:.3f}"]
        table.add_row(*cells, *[said(sample.mean[source], names) for source in shown.sources])
    return table


def _gains_table(heading: str, rows: pl.DataFrame) -> TextTable:
    table = new_table(heading, ["samples", "gain over teacher", "gain over CLIP"])
    for row in rows.to_dicts():
        gained = [points(row[f"gain_over_{name}"]) for name in ("teacher", "clip")]
        table.add_row(cut(row["class"], _FILE), f"{row['n']:,}", *gained)
    return table


def _with_article(source: str) -> str:
    return LABELS[source] if source == "clip" else f"the {LABELS[source]}"
