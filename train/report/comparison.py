"""Trials side by side: which are seeds of the same settings, what the settings differ in, what to compare with."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.recipe import SETTING_ALIASES
from train.report.records import FINISHED, TrialRecord
from train.report.spread import Spread, spread

LABELS_ALONE = "labels alone"
# They follow from the loss, or are another matter without a cache: only runs of the same loss compare in them.
_WITHIN_A_LOSS = ("loss.", "fusion.", "dataset", "views", "schedule.", "num_views")
_NEVER = {"student", "cache", "evaluate_every", "loss.kind", "loss.feature"}
_SHARES = {"top1", "top5", "ece", "best_top1", "ema_top1"}
_NAMES = {"teacher_top1": "teacher", "clip_top1": "CLIP", "fusion_top1": "fusion"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Trials that differ in nothing but their seed, in the order of their seeds.

    Attributes:
        label: tells it from the other settings, as shortly as possible.
        varied: what it has of everything that differs between settings, as text.
        figures: name → spread over the finished trials, or over all where none is finished; each seed counts once.
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
        """As people say it."""
        return said(self.trials[0].loss)

    @property
    def seeds(self) -> tuple[TrialRecord, ...]:
        """One trial per seed."""
        return _one_per_seed(self.trials)

    @property
    def repeated(self) -> list[int]:
        """Seeds that were run more than once."""
        return [seed for seed, count in Counter(trial.seed for trial in self.trials).items() if count > 1]

    @property
    def finished(self) -> bool:
        """Whether its figures count: some trial came to its end."""
        return any(trial.status == FINISHED for trial in self.trials)

    def mean(self, name: str) -> float | None:
        """The mean of a figure, if it is known."""
        return self.figures[name].mean if name in self.figures else None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Top-1 of a teacher, CLIP or their fusion on `n` clean images of `split`, measured when the cache was built."""

    label: str
    top1: float
    n: int | None
    split: str | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Settings, the best mean top-1 first; `varied` are the recipe keys that tell them apart."""

    settings: tuple[Setting, ...]
    varied: tuple[str, ...]
    references: tuple[Reference, ...]

    @property
    def trials(self) -> list[TrialRecord]:
        """Of all settings, in their order."""
        return [trial for setting in self.settings for trial in setting.trials]

    @property
    def best(self) -> Setting | None:
        """The setting with the best mean top-1 of those that are finished."""
        return next((one for one in self.settings if one.finished and "top1" in one.figures), None)


def compare(trials: Sequence[TrialRecord]) -> Comparison:
    """Group trials by their settings and find out what tells these apart."""
    groups = _groups(trials)
    varied = _varied(trials)
    several_caches = len({trial.fingerprint for trial in trials if trial.fingerprint}) > 1
    columns = (*varied, "cache") if several_caches else varied
    texts = [_texts(group[0], columns) for group in groups]
    settings = [
        Setting(
            label=label,
            trials=tuple(sorted(group, key=lambda trial: trial.seed)),
            varied=text,
            figures=_figures(_one_per_seed(group)),
        )
        for group, text, label in zip(groups, texts, _labels(groups, texts), strict=True)
    ]
    settings.sort(key=lambda setting: (not setting.finished, -(setting.mean("top1") or 0.0)))
    return Comparison(settings=tuple(settings), varied=columns, references=_references(trials, several_caches))


def said(loss: str) -> str:
    """A loss as people say it: `ce` is learning from labels alone."""
    return LABELS_ALONE if loss == "ce" else loss


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Dotted keys by their last parts, where these differ."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    names = {key: key.rpartition(".")[2] if last[key.rpartition(".")[2]] == 1 else key for key in keys}
    return {key: name.replace("_", " ") for key, name in names.items()}


def label_names(keys: Sequence[str]) -> dict[str, str]:
    """`short_names`, or shorter where everybody knows what is meant."""
    return short_names(keys) | {full: short for short, full in SETTING_ALIASES.items() if len(short) < 4}


def _groups(trials: Sequence[TrialRecord]) -> list[list[TrialRecord]]:
    groups: dict[str, list[TrialRecord]] = {}
    for trial in sorted(trials, key=lambda trial: not trial.data):  # those without a folder join the others
        similar = (key for key, group in groups.items() if not trial.data and _agrees(trial, group[0]))
        own = [trial.settings, trial.data] if trial.data else [trial.student, trial.loss, trial.settings]
        key = next(similar, _canonical(own))
        groups.setdefault(key, []).append(trial)
    return list(groups.values())


def _agrees(trial: TrialRecord, other: TrialRecord) -> bool:
    """Whether everything that is known of a trial without a folder is so in another one."""
    same = (trial.student, trial.loss) == (other.student, other.loss)
    return same and all(key in other.settings and other.settings[key] == value for key, value in trial.settings.items())


def _varied(trials: Sequence[TrialRecord]) -> tuple[str, ...]:
    """The settings that differ between trials, in the order of the recipe."""
    values: dict[str, dict[str, set[str]]] = {}
    for trial in trials:
        for key, value in trial.settings.items():
            if key not in _NEVER:
                group = trial.loss if key.startswith(_WITHIN_A_LOSS) else ""
                values.setdefault(key, {}).setdefault(group, set()).add(_canonical(value))
    return tuple(key for key, groups in values.items() if any(len(seen) > 1 for seen in groups.values()))


def _texts(trial: TrialRecord, columns: Sequence[str]) -> dict[str, str]:
    values = {**trial.settings, "cache": trial.fingerprint[:8] if trial.fingerprint else None}
    if trial.loss == "ce":  # has no use for the weights of other terms
        values = {key: value for key, value in values.items() if not key.startswith("loss.")}
    return {column: _text(values.get(column)) for column in columns}


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _labels(groups: Sequence[Sequence[TrialRecord]], texts: Sequence[Mapping[str, str]]) -> list[str]:
    """Student and loss where they differ; what else differs, where these are the same; at last a number."""
    several_students = len({group[0].student for group in groups}) > 1
    several_losses = len({group[0].loss for group in groups}) > 1
    heads = [
        " · ".join(
            [group[0].student] * (several_students or not several_losses) + [said(group[0].loss)] * several_losses
        )
        for group in groups
    ]
    names = label_names(list(texts[0])) if texts else {}
    labels: list[str] = []
    for head, text in zip(heads, texts, strict=True):
        same = [other for other, of in zip(texts, heads, strict=True) if of == head]
        differing = [key for key in text if len({other[key] for other in same}) > 1]
        label = " · ".join([head, *(f"{names[key]} {text[key]}" for key in differing)])
        again = sum(earlier == label or earlier.startswith(f"{label} (") for earlier in labels)
        labels.append(f"{label} ({again + 1})" if again else label)
    return labels


def _one_per_seed(trials: Iterable[TrialRecord]) -> tuple[TrialRecord, ...]:
    """The first trial of each seed, preferably a finished one: the same seed twice is one observation."""
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
            (0.0, 1.0) if name in _SHARES else (-math.inf, math.inf),
        )
        for name in names
    }


def _references(trials: Sequence[TrialRecord], several_caches: bool) -> tuple[Reference, ...]:
    found: dict[tuple[str, float], Reference] = {}
    for trial in trials:
        for key, name in _NAMES.items():
            if key in trial.teachers:
                label = f"{name} ({(trial.fingerprint or '')[:8]})" if several_caches else name
                top1, n, split = trial.teachers[key], trial.teachers.get("n"), trial.teachers.get("split")
                found.setdefault((label, top1), Reference(label=label, top1=top1, n=n, split=split))
    return tuple(found.values())


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
