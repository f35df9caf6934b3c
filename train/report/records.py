"""Runs read back for comparison: what a run folder says about one student, finished or not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from cache_tools.config import parse_yaml, validate
from cache_tools.errors import DataError, NotFoundError
from train import checkpoints
from train.recipe import TrainRecipe
from train.runs import folder
from train.runs.metrics import read_metrics
from train.runs.outcome import load_failure
from train.runs.predictions import read_predictions
from train.runs.result import RunResult, load_result

FINISHED, UNFINISHED, STOPPED, FAILED = "finished", "unfinished", "stopped", "failed"
_FIGURES = ("top1", "top5", "nll", "ece")


@dataclass(frozen=True, kw_only=True, eq=False)
class TrialRecord:
    """One student that was trained, or was to be.

    Attributes:
        status: `finished`; `unfinished`, of a run that was interrupted or still goes on; `stopped` early or `failed`,
            of a sweep. `error` says why.
        figures: what is known of top1, top5, nll, ece (test split, last epoch or, of a run that goes on, its last
            evaluation), best_top1, best_epoch (counted from 1), ema_top1, parameters, flops, latency_1_ms,
            latency_128_ms, train_s.
        settings: dotted recipe key → value of everything that determines the result, the seed left out; of a trial
            without a folder, what the sweep's table says.
        data: what the run identifies its images and targets by.
        tested: images of the test split.
        teachers: top-1 of teacher, CLIP and fusion, as `RunResult.teachers`.
        fingerprint: of the cache; None for a run on labels alone.
        folder: of the run; None if it did not come so far.
        recipe: the run's own YAML.
        history: a row per finished epoch.
        predictions: of the last weights, see `train.runs.predictions`.
        twin_of: the folder of the run that it was trained beside, on labels alone.
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
    """Whether a folder holds a run; one that died before it had its recipe there never began."""
    begun = any((path / name).is_file() for name in (folder.RECIPE, folder.RESULT))
    return begun and (path / folder.IDENTITY).is_file()


def read_run(path: Path) -> list[TrialRecord]:
    """The run in a folder and, if there is one, its twin on labels alone.

    Raises:
        NotFoundError: no run there.
        DataError, RecipeError, WeightsError: a damaged file.
    """
    trial, twin = _read_folder(path), path / folder.LABELS_ONLY
    return [trial, replace(_read_folder(twin), twin_of=path)] if is_run(twin) else [trial]


def _read_folder(path: Path) -> TrialRecord:
    identity, recipe = _identity(path), path / folder.RECIPE
    common: dict[str, Any] = {
        "settings": {key: value for key, value in folder.flat(identity["recipe"]).items() if key != "seed"},
        "data": identity["data"],
        "fingerprint": identity["data"].get("fingerprint"),
        "folder": path,
        "recipe": recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        "history": read_metrics(path),
        "predictions": read_predictions(path),
        "class_names": _class_names(path),
    }
    result = load_result(path)
    return _finished(result, common) if result is not None else _unfinished(recipe, common)


def _finished(result: RunResult, common: Mapping[str, Any]) -> TrialRecord:
    figures: dict[str, float | None] = {name: getattr(result.last, name, None) for name in _FIGURES}
    figures |= {"best_top1": getattr(result.best, "top1", None), "ema_top1": getattr(result.ema, "top1", None)}
    figures |= {"best_epoch": None if result.best_epoch is None else result.best_epoch + 1}
    figures |= {"parameters": result.parameters, "train_s": result.train_s}
    return TrialRecord(
        name=result.name,
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


def _unfinished(recipe_file: Path, common: Mapping[str, Any]) -> TrialRecord:
    data = parse_yaml(common["recipe"], "damaged recipe", where=recipe_file)
    recipe = validate(TrainRecipe, data or {}, where=str(recipe_file))
    failure = load_failure(recipe_file.parent)
    history = common["history"] if common["history"] is not None else pl.DataFrame({"train_s": []})
    tested = history.filter(pl.col("test_n").is_not_null()).tail(1).to_dicts() if "test_n" in history.columns else []
    row = tested[0] if tested else {}
    figures = {name: row.get(f"test_{name}") for name in _FIGURES} | {"train_s": history["train_s"].sum() or None}
    return TrialRecord(
        name=recipe.name,
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
    """Those that there are, and are numbers."""
    return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}


def _identity(path: Path) -> dict[str, Any]:
    """What determined the run, as its folder keeps it."""
    file = path / folder.IDENTITY
    try:
        identity = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(
            "no run of train-student here",
            where=path,
            expected="a run folder, or the folder of a sweep",
            found="nothing" if not path.exists() else f"no {folder.IDENTITY}",
        ) from error
    except ValueError as error:
        raise DataError("damaged record of a run", where=file, found=str(error).partition("\n")[0]) from error
    parts = [identity.get(key) for key in ("recipe", "data")] if isinstance(identity, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise DataError("damaged record of a run", where=file, expected="recipe and data")
    return identity


def _class_names(path: Path) -> tuple[str, ...] | None:
    for name in (checkpoints.LAST, checkpoints.BEST):
        if (path / name).is_file():
            return checkpoints.read_card(path / name).class_names
    return None
