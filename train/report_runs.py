"""The page's last part: of each run the exact command, its recipe, and where it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape

from train.comparison import Comparison, said
from train.records import FINISHED, TrialRecord


def run_details(comparison: Comparison, anchors: Mapping[TrialRecord, str]) -> str:
    """A part to unfold for each trial, in the order of the settings."""
    return "\n".join(
        line
        for number, setting in enumerate(comparison.settings)
        for trial in setting.trials
        for line in _trial(trial, number, setting.label, anchors[trial])
    )


def _trial(trial: TrialRecord, setting: int, label: str, anchor: str) -> Iterator[str]:
    top1 = trial.figures.get("top1")
    figure = trial.status if trial.status != FINISHED else "" if top1 is None else f"{100 * top1:.2f} %"
    yield f'<details class="run" id="{anchor}" data-setting="{setting}">'
    name = f"{escape(label)}, seed {trial.seed}"
    yield f'<summary><span class="key"></span>{name}<span class="figure">{escape(figure)}</span></summary>'
    if trial.error:
        yield f'<p class="error"><strong>{escape(trial.status.capitalize())}:</strong> {escape(trial.error)}</p>'
    if trial.twin_of is not None:
        yield "<p>The same student on labels alone, trained beside another run by that run's command.</p>"
    if trial.command:
        yield from _copied("Command", trial.command, "command")
    yield "<dl>"
    for name, value in _facts(trial):
        yield f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
    yield "</dl>"
    if trial.recipe:
        yield from _copied("Recipe", trial.recipe.rstrip(), "recipe")
    yield "</details>"


def _copied(title: str, text: str, kind: str) -> Iterator[str]:
    """A text with a button that copies it."""
    yield f'<div class="copied {kind}"><h3>{title}</h3><button type="button" class="copy">Copy {title.lower()}</button>'
    yield f'<pre tabindex="0"><code>{escape(text)}</code></pre></div>'


def _facts(trial: TrialRecord) -> Iterator[tuple[str, str]]:
    yield "Loss", said(trial.loss)
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
