"""Read run folders back for comparison, finished or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from cache_tools.errors import NotFoundError
from train import checkpoints
from train.evaluate.multilabel import HEADLINES
from train.runs import folder
from train.runs.metrics import read_metrics
from train.runs.outcome import load_failure
from train.runs.predictions import read_predictions
from train.runs.result import RunResult, load_result
from train.runs.stored import data_name, read_manifest, read_recipe_of, recipe_text
from train.weights.run_files import has_file

FINISHED, UNFINISHED, STOPPED, FAILED = "finished", "unfinished", "stopped", "failed"
FIGURE_ON = "figure on "  # the top-1 or mAP of a further test split
_FIGURES = ("top1", "top5", "nll", "ece", "map", "bce")


@dataclass(frozen=True, kw_only=True, eq=False)
class TrialRecord:
    """One training of one student, finished or not.

    Attributes:
        name: what the images are called; see `train.runs.stored.data_name`.
        status: `finished`; `unfinished` if it was interrupted or is still running; in a sweep also `stopped` early or
            `failed`. `error` has the reason.
        figures: the known ones of top1, top5, nll, ece, map, bce (test split, last epoch; of an unfinished run its last
            evaluation), `figure on SPLIT` for further test splits, best_top1, best_map, best_epoch (counted from 1),
            ema_top1, ema_map, parameters, flops, latency_1_ms, latency_128_ms, train_s. `compare` adds gain, and
            labels_top1 or labels_map.
        settings: dotted recipe key → value of everything that determines the result, without the seed; of a trial
            without a folder, the settings in the sweep's table.
        data: identity of images and targets, as in the run's identity.
        images: digest of the cache's images; None for a run on labels alone, which has it in `data`.
        tested: number of images of the test split.
        teachers: top-1 of teacher, CLIP and fusion, as in `RunResult.teachers`.
        fingerprint: of the cache; None for a run on labels alone.
        folder: of the run; None if it was never created.
        recipe: the run's YAML.
        history: a row per finished epoch.
        predictions: of the last weights, see `train.runs.predictions`.
        twin_of: folder of the run that this run on labels alone belongs to.
    """

    name: str
    student: str
    loss: str
    seed: int
    status: str = FINISHED
    error: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    images: str | None = None
    epochs: int | None = None
    test_split: str | None = None
    tested: int | None = None
    teachers: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    folder: Path | None = None
    command: str = ""
    recipe: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    history: pl.DataFrame | None = None
    predictions: pl.DataFrame | None = None
    class_names: tuple[str, ...] | None = None
    twin_of: Path | None = None


def is_run(path: Path) -> bool:
    """Whether a folder holds a run. A run that died before its recipe was written does not count."""
    started = any(has_file(path / name) for name in (folder.RECIPE, folder.RESULT))
    return started and has_file(path / folder.IDENTITY)


def read_run(path: Path) -> list[TrialRecord]:
    """The run in a folder and, if it has one, its twin on labels alone.

    Raises:
        NotFoundError: the folder holds no run.
        DataError, RecipeError, WeightsError: a damaged file.
    """
    trial, twin = _read_folder(path), path / folder.LABELS_ONLY
    return [trial, replace(_read_folder(twin), name=trial.name, twin_of=path)] if is_run(twin) else [trial]


def _read_folder(path: Path) -> TrialRecord:
    identity, names = _identity(path), _class_names(path)
    manifest = read_manifest(path)
    common: dict[str, Any] = {
        "settings": {key: value for key, value in folder.flatten(identity["recipe"]).items() if key != "seed"},
        "data": identity["data"],
        "images": None if manifest is None else manifest.recipe.dataset.content_digest,
        "fingerprint": identity["data"].get("fingerprint"),
        "folder": path,
        "recipe": recipe_text(path) or "",
        "history": read_metrics(path),
        "predictions": read_predictions(path, None if names is None else len(names)),
        "class_names": names,
    }
    result = load_result(path)
    return _finished(result, common) if result is not None else _unfinished(path, common)


def _finished(result: RunResult, common: Mapping[str, Any]) -> TrialRecord:
    figures: dict[str, float | None] = {name: getattr(result.last, name, None) for name in _FIGURES}
    for name in HEADLINES:
        figures |= {f"best_{name}": getattr(result.best, name, None), f"ema_{name}": getattr(result.ema, name, None)}
    figures |= {"best_epoch": None if result.best_epoch is None else result.best_epoch + 1}
    figures |= {"parameters": result.parameters, "train_s": result.train_s}
    figures |= {
        f"{FIGURE_ON}{split}": getattr(more.last, "headline", None) for split, more in result.more_tests.items()
    }
    return TrialRecord(
        name=data_name(result.folder, result.name),
        student=result.student,
        loss=result.loss,
        seed=result.seed,
        figures=known(figures),
        epochs=result.epochs,
        test_split=result.test_split,
        tested=None if result.last is None else result.last.n,
        teachers=result.teachers or {},
        command=result.command,
        environment=result.environment,
        **common,
    )


def _unfinished(path: Path, common: Mapping[str, Any]) -> TrialRecord:
    recipe = read_recipe_of(path)
    if recipe is None:
        raise NotFoundError("the run has neither a recipe nor a result", where=path)
    failure = load_failure(path)
    history = common["history"] if common["history"] is not None else pl.DataFrame({"train_s": []})
    tested = history.filter(pl.col("test_n").is_not_null()).tail(1).to_dicts() if "test_n" in history.columns else []
    row = tested[0] if tested else {}
    train_s = history["train_s"].cast(pl.Float64).sum() if "train_s" in history.columns else 0.0
    figures = {name: row.get(f"test_{name}") for name in _FIGURES} | {"train_s": train_s or None}
    return TrialRecord(
        name=data_name(path, recipe.name),
        student=recipe.student,
        loss=recipe.loss_name,
        seed=recipe.seed,
        status=UNFINISHED if failure is None else FAILED,
        error=f"{len(history)} of {recipe.epochs} epochs are done" if failure is None else failure.message,
        figures=known(figures),
        epochs=recipe.epochs,
        tested=row.get("test_n"),
        **common,
    )


def known(figures: Mapping[str, float | None]) -> dict[str, float]:
    """The figures without None, NaN and infinity."""
    return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}


def _identity(path: Path) -> dict[str, Any]:
    """The stored identity of a run: the recipe and data that determine its result."""
    identity = folder.read_identity(path)
    if identity is None:
        raise NotFoundError(
            "no run of train-student here",
            where=path,
            expected="a run folder, or the folder of a sweep",
            found="nothing" if not path.exists() else f"no {folder.IDENTITY}",
        )
    return identity


def _class_names(path: Path) -> tuple[str, ...] | None:
    for name in (checkpoints.LAST, checkpoints.BEST):
        if has_file(path / name):
            return checkpoints.read_card(path / name).class_names
    return None
