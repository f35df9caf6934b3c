"""The text of the page around its table and plots: title, key figures, notices, filters, and a section per run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from html import escape

from train.report.comparison import Comparison, Setting, displayed_loss
from train.report.records import FINISHED, TrialRecord

_FILTERS_FROM = 4  # settings; fewer need no filters
_MAX_REFERENCES = 6


def headline(comparison: Comparison) -> str:
    """A title from the values that all settings share."""
    names = data_names(comparison)
    students = list(dict.fromkeys(setting.student for setting in comparison.settings))
    subject = students[0] if len(students) == 1 else f"{len(students)} students"
    return f"{subject} on {names[0]}" if len(names) == 1 else subject


def data_names(comparison: Comparison) -> list[str]:
    """What the images are called: the names of the caches, or of the datasets where there is no cache."""
    named = [trial for trial in comparison.trials if trial.name]
    of_caches = [trial for trial in named if trial.fingerprint is not None]
    return list(dict.fromkeys(trial.name for trial in of_caches or named))


def summary(comparison: Comparison) -> str:
    """The line under the title: numbers of runs, epochs and test images."""
    trials, settings = len(comparison.trials), len(comparison.settings)
    parts = [f"{trials} run{'s' * (trials > 1)}" + (f" of {settings} settings" if trials > settings > 1 else "")]
    epochs = sorted({trial.epochs for trial in comparison.trials if trial.epochs})
    if epochs:
        count = f"{epochs[0]:,}" if len(epochs) == 1 else f"{epochs[0]:,} to {epochs[-1]:,}"
        parts.append(f"{count} epoch{'s' * (epochs[-1] > 1)}")
    if len(tested := {trial.tested for trial in comparison.trials if trial.tested}) == 1:
        names = data_names(comparison)
        parts.append(f"{tested.pop():,} test images{f' of {names[0]}' if len(names) == 1 else ''}")
    return escape(" · ".join(parts))


def facts(comparison: Comparison) -> str:
    """The key figures, each with its name and a note, as a description list."""
    items = "\n".join(
        f'<div class="{kind}"><dt>{escape(name)}</dt><dd>{escape(figure)} <small>{escape(note)}</small></dd></div>'
        for kind, name, figure, note in _facts(comparison)
    )
    return f'<dl class="facts">\n{items}\n</dl>' if items else ""


def notices(comparison: Comparison) -> str:
    """Warnings about the comparability of the figures."""
    lines = "\n".join(f"<li>{escape(line)}</li>" for line in _notices(comparison))
    return f'<ul class="notices">\n{lines}\n</ul>' if lines else ""


def filters(comparison: Comparison) -> str:
    """The filters above the leaderboard; empty for a few settings."""
    if len(comparison.settings) < _FILTERS_FROM:
        return ""
    students = list(dict.fromkeys(setting.student for setting in comparison.settings))
    losses = list(dict.fromkeys(setting.loss for setting in comparison.settings))
    return "\n".join(
        [
            '<form class="filters" role="search" aria-label="Filter the runs">',
            '<label>Search <input type="search" id="filter-text" autocomplete="off" spellcheck="false"></label>',
            _choice("student", "Student", sorted(students)),
            _choice("loss", "Loss", sorted(losses)),
            '<button type="reset" id="filter-clear" disabled>Clear</button>',
            "</form>",
        ]
    )


def run_details(comparison: Comparison, anchors: Mapping[TrialRecord, str]) -> str:
    """A section that unfolds for each trial, in the order of the settings.

    Args:
        anchors: trial → id of its section.
    """
    return "\n".join(
        line
        for number, setting in enumerate(comparison.settings)
        for trial in setting.trials
        for line in _trial(trial, number, setting.label, anchors[trial], comparison.figure)
    )


def _facts(comparison: Comparison) -> Iterator[tuple[str, str, str, str]]:
    """(kind, name, figure, note)"""
    first = comparison.headline
    if first is not None:
        found = first.figures[comparison.figure]
        seeds = "" if found.n == 1 else f", mean of {found.n} seeds"
        name = f"{_headline_name(comparison, first)}, {comparison.figure_name}"
        yield "first", name, _percent(found.mean), first.label + seeds
        if "gain" in first.figures:
            yield from _gain(comparison, first)
        elif len(comparison.settings) == 2:
            yield from _other(comparison, first)
    if len(comparison.references) <= _MAX_REFERENCES:
        for reference in comparison.references:
            note = "" if reference.n is None else f"{reference.n:,} {reference.split or 'labelled'} images"
            label = reference.label[0].upper() + reference.label[1:]
            yield "reference", label, _percent(reference.figure), note


def _headline_name(comparison: Comparison, first: Setting) -> str:
    if len(comparison.settings) <= 2:
        return "Student"
    others = any(setting.on_labels for setting in comparison.settings)
    return "Best distilled student" if others and not first.on_labels else "Best student"


def _gain(comparison: Comparison, first: Setting) -> Iterator[tuple[str, str, str, str]]:
    """The same student on labels alone, and the difference, whatever its sign."""
    gain, labels = first.figures["gain"], first.figures[f"labels_{comparison.figure}"]
    pairs = "one seed" if gain.n == 1 else f"mean of {gain.n} seeds"
    yield "second", f"On labels alone, {comparison.figure_name}", _percent(labels.mean), f"the same student, {pairs}"
    interval = "" if gain.low is None else f", 95 % interval {100 * gain.low:+.2f} to {100 * (gain.high or 0.0):+.2f}"
    yield (
        "second",
        "Distilled − labels alone",
        f"{100 * gain.mean:+.2f}",
        f"points of {comparison.figure_name}, {pairs}{interval}",
    )


def _other(comparison: Comparison, first: Setting) -> Iterator[tuple[str, str, str, str]]:
    """The other of two settings, and their difference if both or neither were distilled."""
    other = next(setting for setting in comparison.settings if setting is not first)
    figure = comparison.figure
    if not other.finished or figure not in other.figures:
        return
    found = other.figures[figure].mean
    yield "second", f"{other.label[0].upper()}{other.label[1:]}", _percent(found), "for comparison"
    if first.on_labels == other.on_labels:
        difference = f"{100 * (first.figures[figure].mean - found):+.2f}"
        yield "second", "Difference", difference, f"points of {comparison.figure_name}"


def _notices(comparison: Comparison) -> Iterator[str]:
    trials = comparison.trials
    tests = {(trial.tested, trial.class_names) for trial in trials if trial.tested and trial.class_names}
    if len(tests) > 1:
        yield "These runs were tested on different images or classes, so their figures cannot be compared."
    others = Counter(trial.status for trial in trials if trial.status != FINISHED)
    if others:
        counts = ", ".join(f"{count} {status}" for status, count in others.items())
        yield f"Of {len(trials)} runs, {counts}: not in means, intervals and Pareto fronts."
    for setting in comparison.settings:
        if seeds := setting.repeated_seeds:
            yield f"{setting.label}: seed {', '.join(map(str, seeds))} was run more than once and counts once."
    compared = [setting for setting in comparison.settings if setting.finished]
    if len(compared) > 1 and all(len(setting.trials) == 1 for setting in compared):
        yield "One seed per setting: small differences may be chance. With several seeds the page shows intervals."


def _choice(name: str, title: str, values: list[str]) -> str:
    options = "".join(f"<option>{escape(value)}</option>" for value in values)
    disabled = " disabled" if len(values) < 2 else ""
    return (
        f'<label>{title} <select id="filter-{name}"{disabled}><option value="">all</option>{options}</select></label>'
    )


def _trial(trial: TrialRecord, setting: int, label: str, anchor: str, compared: str) -> Iterator[str]:
    found = trial.figures.get(compared)
    figure = trial.status if trial.status != FINISHED else "" if found is None else _percent(found)
    yield f'<details class="run" id="{anchor}" data-setting="{setting}">'
    name = f"{escape(label)}, seed {trial.seed}"
    yield f'<summary><span class="key"></span>{name}<span class="figure">{escape(figure)}</span></summary>'
    if trial.error:
        yield f'<p class="error"><strong>{escape(trial.status.capitalize())}:</strong> {escape(trial.error)}</p>'
    if trial.twin_of is not None:
        yield "<p>The same student on labels alone, trained by the command of another run for comparison.</p>"
    if trial.command:
        yield from _with_copy_button("Command", trial.command, "command")
    yield "<dl>"
    for name, value in _trial_facts(trial):
        yield f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
    yield "</dl>"
    if trial.recipe:
        yield from _with_copy_button("Recipe", trial.recipe.rstrip(), "recipe")
    yield "</details>"


def _with_copy_button(title: str, text: str, kind: str) -> Iterator[str]:
    yield f'<div class="copied {kind}"><h3>{title}</h3><button type="button" class="copy">Copy {title.lower()}</button>'
    yield f'<pre tabindex="0"><code>{escape(text)}</code></pre></div>'


def _trial_facts(trial: TrialRecord) -> Iterator[tuple[str, str]]:
    yield "Loss", displayed_loss(trial.loss)
    if trial.epochs is not None:
        yield "Epochs", f"{trial.epochs:,}"
    if trial.folder is not None:
        yield "Folder", str(trial.folder)
    if trial.fingerprint:
        yield "Cache", trial.fingerprint
    names = {"device": "Device", "platform": "Platform"}
    yield from ((title, trial.environment[key]) for key, title in names.items() if key in trial.environment)
    versions = [f"{key} {value}" for key, value in trial.environment.items() if key not in names]
    if versions:
        yield "Versions", ", ".join(versions)


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"
