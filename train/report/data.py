"""The data of the page's plots, as plain data for its script."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from train.report.comparison import Comparison, Setting
from train.report.records import FINISHED, TrialRecord
from train.runs.predictions import class_accuracy, reliability

_TEST_CURVES = ("test_top1", "test_map", "test_nll", "test_bce", "test_ece", "ema_top1", "ema_map")
CURVES = (*_TEST_CURVES, "loss", "loss_ce", "loss_logit", "loss_feature")
COSTS = ("parameters", "flops", "latency_1_ms", "latency_128_ms")
_MAX_POINTS = 160  # of a curve: a plot is not wide enough to show more


def page_data(comparison: Comparison) -> dict[str, Any]:
    """The settings in their order, each with its trials, and the data that all settings share.

    `top1` is the mAP where `figure` says so. Accuracies are in [0, 1], epochs count from 1, unknown values are null.
    Top-1 and costs of the settings are exact,
    because the page compares them and prints them in full. Other numbers are only drawn, so they are rounded.
    """
    names = class_names(comparison.trials)
    return {
        "figure": {"key": comparison.figure, "name": comparison.figure_name},
        "settings": [_setting(setting, names, comparison.figure) for setting in comparison.settings],
        "references": [{"label": one.label, "top1": _rounded(one.figure)} for one in comparison.references],
        "classes": None if names is None else {"names": list(names), "counts": _class_counts(comparison, names)},
    }


def class_names(trials: Sequence[TrialRecord]) -> tuple[str, ...] | None:
    """The classes of the trials with predictions; if they differ, those of most trials."""
    found = Counter(trial.class_names for trial in trials if trial.predictions is not None and trial.class_names)
    return found.most_common(1)[0][0] if found else None


def _setting(setting: Setting, names: tuple[str, ...] | None, figure: str) -> dict[str, Any]:
    top1, gain, predictions = setting.figures.get(figure), setting.figures.get("gain"), _predictions(setting, None)
    comparable = None if names is None else _predictions(setting, names)
    return {
        "label": setting.label,
        "status": FINISHED if setting.finished else setting.trials[0].status,
        "trials": [_trial(trial, figure) for trial in setting.seeds],
        "top1": None if top1 is None else {key: getattr(top1, key) for key in ("n", "mean", "low", "high")},
        "gain": None if gain is None else {key: getattr(gain, key) for key in ("n", "mean", "low", "high")},
        "ece": _rounded(setting.mean("ece")),
        "costs": {name: setting.mean(name) for name in COSTS},
        "reliability": None if predictions is None else _columns(reliability(predictions)),
        "classes": None
        if comparable is None or names is None
        else [_rounded(value) for value in class_accuracy(comparable, len(names))["accuracy"]],
    }


def _trial(trial: TrialRecord, figure: str) -> dict[str, Any]:
    return {
        "seed": trial.seed,
        "finished": trial.status == FINISHED,
        "top1": _rounded(trial.figures.get(figure)),
        "curves": {} if trial.history is None else _curves(trial.history),
    }


def _curves(history: pl.DataFrame) -> dict[str, Any]:
    """Name → [epochs, values], finite values only. Long curves are thinned evenly and keep their ends."""
    curves = {}
    for name in CURVES:
        if name not in history.columns:
            continue
        points = history.select(pl.col("epoch") + 1, pl.col(name).cast(pl.Float64)).filter(pl.col(name).is_finite())
        if not len(points):
            continue
        if len(points) > _MAX_POINTS:
            points = points[np.linspace(0, len(points) - 1, _MAX_POINTS).round().astype(int).tolist()]
        curves[name] = [points["epoch"].to_list(), [_rounded(value) for value in points[name]]]
    return curves


def _predictions(setting: Setting, names: tuple[str, ...] | None) -> pl.DataFrame | None:
    """The predictions of all finished seeds in one table. With `names`, only of trials with these classes."""
    tables = [
        trial.predictions
        for trial in setting.seeds
        if trial.predictions is not None and trial.status == FINISHED and names in {None, trial.class_names}
    ]
    return pl.concat(tables) if tables else None


def _class_counts(comparison: Comparison, names: tuple[str, ...]) -> list[int]:
    """Number of test images of each class."""
    tables = (trial.predictions for trial in comparison.trials if trial.class_names == names)
    table = next(table for table in tables if table is not None)
    return class_accuracy(table, len(names))["count"].to_list()


def _columns(table: pl.DataFrame) -> dict[str, list[float | None]]:
    return {name: [_rounded(value) for value in table[name]] for name in table.columns}


def _rounded(value: float | None) -> float | None:
    """Five digits, which is more than a plot shows; None for NaN and infinity, which JSON does not have."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.5g}") if isinstance(value, float) else value
