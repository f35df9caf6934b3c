"""Compare trials: group seeds of the same settings, and find the keys in which settings differ."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from train.evaluate.multilabel import HEADLINES, headline_of
from train.recipe.loading import SETTING_ALIASES
from train.recipe.loss import LABELS_ALONE as LOSSES_WITHOUT_TARGETS
from train.report.gains import gains, pairing, twins
from train.report.records import FIGURE_ON, FINISHED, TrialRecord
from train.report.spread import Spread, spread
from train.runs.result import figures_of_teachers

LABELS_ALONE = "labels alone"
# These keys follow from the loss or the cache, so they are compared only between runs of the same loss.
_WITHIN_A_LOSS = ("loss.", "fusion.", "dataset", "views", "schedule.", "num_views")
_NOT_COMPARED = {"student", "cache", "evaluate_every", "loss.kind", "loss.feature"}
_FRACTIONS = {"top5", "ece", *(f"{which}{name}" for which in ("", "best_", "ema_", "labels_") for name in HEADLINES)}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Trials that differ only in their seed, in the order of their seeds.

    Attributes:
        label: a short text that no other setting has.
        varied: recipe key → value as text, for the keys that differ between settings.
        figures: name → spread over the finished trials, or over all trials if none is finished. A seed counts once.
            `gain` is the spread of the differences in top-1 between the trials and their twins on labels alone, and
            `labels_top1` that of the top-1 of these twins.
    """

    label: str
    trials: tuple[TrialRecord, ...]
    varied: Mapping[str, str]
    figures: Mapping[str, Spread]

    @property
    def student(self) -> str:
        return self.trials[0].student

    @property
    def loss(self) -> str:
        """The loss as it is displayed."""
        return displayed_loss(self.trials[0].loss)

    @property
    def on_labels(self) -> bool:
        """Whether nothing was distilled."""
        return self.trials[0].loss in LOSSES_WITHOUT_TARGETS

    @property
    def seeds(self) -> tuple[TrialRecord, ...]:
        """One trial per seed."""
        return _one_per_seed(self.trials)

    @property
    def repeated_seeds(self) -> list[int]:
        """Seeds with more than one trial."""
        return [seed for seed, count in Counter(trial.seed for trial in self.trials).items() if count > 1]

    @property
    def finished(self) -> bool:
        """Whether a trial is finished, so that the figures count."""
        return any(trial.status == FINISHED for trial in self.trials)

    def mean(self, name: str) -> float | None:
        """The mean of a figure; None if it is not known."""
        return self.figures[name].mean if name in self.figures else None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The figure of a teacher, CLIP or their fusion on `n` clean images of `split`, from the cache's preflight."""

    label: str
    figure: float
    n: int | None
    split: str | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Settings, the best mean figure first; `varied` are the recipe keys in which they differ.

    `figure` is what settings are compared by: `top1` or, for images with several labels, `map`.
    """

    settings: tuple[Setting, ...]
    varied: tuple[str, ...]
    references: tuple[Reference, ...]
    figure: str = "top1"

    @property
    def figure_name(self) -> str:
        """The figure as it is displayed."""
        return HEADLINES[self.figure]

    @property
    def trials(self) -> list[TrialRecord]:
        """The trials of all settings, in order."""
        return [trial for setting in self.settings for trial in setting.trials]

    @property
    def headline(self) -> Setting | None:
        """The best distilled setting; if nothing was distilled, the best one."""
        ranked = [setting for setting in self.settings if setting.finished and self.figure in setting.figures]
        return next((setting for setting in ranked if not setting.on_labels), ranked[0] if ranked else None)


def compare(trials: Sequence[TrialRecord]) -> Comparison:
    """Group trials by their settings, find the keys in which these differ, and pair distilled trials with twins."""
    figure = headline_of(any("map" in trial.figures for trial in trials))
    trials = _with_gains(trials, figure)
    groups = _groups(trials)
    varied = _varied(trials)
    several_caches = len({trial.fingerprint for trial in trials if trial.fingerprint}) > 1
    columns = (*varied, "cache") if several_caches else varied
    values = [_values(group[0], columns) for group in groups]
    settings = [
        Setting(
            label=label,
            trials=tuple(sorted(group, key=lambda trial: trial.seed)),
            varied=varied_values,
            figures=_figures(_one_per_seed(group)),
        )
        for group, varied_values, label in zip(groups, values, _labels(groups, values), strict=True)
    ]
    settings.sort(key=lambda setting: (not setting.finished, -(setting.mean(figure) or 0.0)))
    references = _references(trials, several_caches)
    return Comparison(settings=tuple(settings), varied=columns, references=references, figure=figure)


def _with_gains(trials: Sequence[TrialRecord], figure: str) -> list[TrialRecord]:
    """The trials; those with a twin on labels alone have two more figures, `gain` and `labels_top1` or `labels_map`."""
    known = [
        pairing(
            trial.settings,
            trial.data,
            seed=trial.seed,
            on_labels=trial.loss in LOSSES_WITHOUT_TARGETS,
            figure=trial.figures.get(figure) if trial.status == FINISHED else None,
            images=trial.images,
        )
        for trial in trials
    ]
    return [
        trial
        if gain is None or place is None
        else replace(trial, figures={**trial.figures, "gain": gain, f"labels_{figure}": trials[place].figures[figure]})
        for trial, gain, place in zip(trials, gains(known), twins(known), strict=True)
    ]


def displayed_loss(loss: str) -> str:
    """The loss as it is displayed: "labels alone" for `ce` and `bce-labels`."""
    return LABELS_ALONE if loss in LOSSES_WITHOUT_TARGETS else loss


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Dotted key → its last part, or the whole key where two last parts are equal; with spaces for underscores."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    names = {key: key.rpartition(".")[2] if last[key.rpartition(".")[2]] == 1 else key for key in keys}
    return {key: name.replace("_", " ") for key, name in names.items()}


def label_names(keys: Sequence[str]) -> dict[str, str]:
    """`short_names`, with well-known abbreviations such as `lr`."""
    return short_names(keys) | {full: short for short, full in SETTING_ALIASES.items() if len(short) < 4}


def _groups(trials: Sequence[TrialRecord]) -> list[list[TrialRecord]]:
    groups: dict[str, list[TrialRecord]] = {}
    for trial in sorted(trials, key=lambda trial: not trial.data):  # trials without a folder come last, to join others
        matching = (key for key, group in groups.items() if not trial.data and _agrees(trial, group[0]))
        own_key = [trial.settings, trial.data] if trial.data else [trial.student, trial.loss, trial.settings]
        key = next(matching, _canonical(own_key))
        groups.setdefault(key, []).append(trial)
    return list(groups.values())


def _agrees(trial: TrialRecord, other: TrialRecord) -> bool:
    """Whether another trial has all the known settings of a trial without a folder."""
    same_kind = (trial.student, trial.loss) == (other.student, other.loss)
    return same_kind and all(
        key in other.settings and other.settings[key] == value for key, value in trial.settings.items()
    )


def _varied(trials: Sequence[TrialRecord]) -> tuple[str, ...]:
    """The settings that differ between trials, in the order of the recipe."""
    values: dict[str, dict[str, set[str]]] = {}
    for trial in trials:
        for key, value in trial.settings.items():
            if key not in _NOT_COMPARED:
                group = trial.loss if key.startswith(_WITHIN_A_LOSS) else ""
                values.setdefault(key, {}).setdefault(group, set()).add(_canonical(value))
    return tuple(key for key, groups in values.items() if any(len(seen) > 1 for seen in groups.values()))


def _values(trial: TrialRecord, columns: Sequence[str]) -> dict[str, str]:
    """The trial's values of these keys, as text."""
    values = {**trial.settings, "cache": trial.fingerprint[:8] if trial.fingerprint else None}
    if trial.loss in LOSSES_WITHOUT_TARGETS:  # other weights of the loss have no effect
        values = {key: value for key, value in values.items() if not key.startswith("loss.")}
    return {column: _text(values.get(column)) for column in columns}


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _labels(groups: Sequence[Sequence[TrialRecord]], values: Sequence[Mapping[str, str]]) -> list[str]:
    """A label per group: student and loss if these vary, then values that differ between equal ones, then a number."""
    several_students = len({group[0].student for group in groups}) > 1
    several_losses = len({group[0].loss for group in groups}) > 1
    heads = [
        " · ".join(
            [group[0].student] * (several_students or not several_losses)
            + [displayed_loss(group[0].loss)] * several_losses
        )
        for group in groups
    ]
    names = label_names(list(values[0])) if values else {}
    labels: list[str] = []
    for head, own in zip(heads, values, strict=True):
        same_head = [other for other, other_head in zip(values, heads, strict=True) if other_head == head]
        differing = [key for key in own if len({other[key] for other in same_head}) > 1]
        label = " · ".join([head, *(f"{names[key]} {own[key]}" for key in differing)])
        duplicates = sum(earlier == label or earlier.startswith(f"{label} (") for earlier in labels)
        labels.append(f"{label} ({duplicates + 1})" if duplicates else label)
    return labels


def _one_per_seed(trials: Iterable[TrialRecord]) -> tuple[TrialRecord, ...]:
    """The first trial of each seed, a finished one if there is one: the same seed twice is one observation."""
    seeds: dict[int, TrialRecord] = {}
    for trial in sorted(trials, key=lambda trial: (trial.seed, trial.status != FINISHED)):
        seeds.setdefault(trial.seed, trial)
    return tuple(seeds.values())


def _figures(trials: Sequence[TrialRecord]) -> dict[str, Spread]:
    counted = [trial for trial in trials if trial.status == FINISHED] or trials
    names = dict.fromkeys(name for trial in counted for name in trial.figures)
    return {
        name: spread(
            [trial.figures[name] for trial in counted if name in trial.figures],
            (0.0, 1.0) if name in _FRACTIONS or name.startswith(FIGURE_ON) else (-math.inf, math.inf),
        )
        for name in names
    }


def _references(trials: Sequence[TrialRecord], several_caches: bool) -> tuple[Reference, ...]:
    found: dict[tuple[str, float], Reference] = {}
    for trial in trials:
        for name, figure in figures_of_teachers(trial.teachers).items():
            label = f"{name} ({(trial.fingerprint or '')[:8]})" if several_caches else name
            n, split = trial.teachers.get("n"), trial.teachers.get("split")
            found.setdefault((label, figure), Reference(label=label, figure=figure, n=n, split=split))
    return tuple(found.values())


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
