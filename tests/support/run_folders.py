"""Run folders and sweeps like those of the commands, without training, with results that a test chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from cache_tools.config import dump_yaml
from train.checkpoints import LAST, StudentCard, save_weights
from train.evaluate.metrics import Evaluation
from train.recipe import TrainRecipe, recipe_digest
from train.runs import folder
from train.runs.predictions import write_predictions
from train.runs.result import RunResult

TEACHERS = {"teacher_top1": 0.93, "clip_top1": 0.81, "fusion_top1": 0.94, "split": "test", "n": 400}
FINGERPRINT = "5b0f551fbe13" + "0" * 52


def write_run(
    path: Path,
    *,
    student: str = "resnet8",
    loss: str = "kd",
    seed: int = 0,
    top1: float = 0.9,
    epochs: int = 4,
    parameters: int = 78_042,
    classes: int = 10,
    finished: bool = True,
    predictions: bool = True,
    name: str = "digits",
    command: str = "",
    class_names: tuple[str, ...] = (),
    **changes: Any,
) -> Path:
    """Write a run with 400 test images whose last top-1 is about `top1`; `changes` are keys of its recipe."""
    data: dict[str, Any] = {
        "name": name,
        "cache": None if loss == "ce" else "digits",
        "dataset": {"name": "digits"} if loss == "ce" else None,
        "student": student,
        "loss": {"kind": loss},
        "epochs": epochs,
        "seed": seed,
    }
    recipe = TrainRecipe.model_validate(data | changes)
    path.mkdir(parents=True)
    table = _predictions(np.random.default_rng(seed), top1, classes)
    right = float(np.mean((table["label"] == table["predicted"]).to_numpy()))
    history = _history(epochs if finished else epochs - 1, right)
    history.write_parquet(path / folder.METRICS)
    identity = {
        "recipe": recipe.values(),
        "data": {"images": "0" * 64} if loss == "ce" else {"fingerprint": FINGERPRINT},
    }
    (path / folder.IDENTITY).write_text(json.dumps(identity))
    (path / folder.RECIPE).write_text(dump_yaml(recipe))
    if predictions:
        write_predictions(path, table)
        save_weights(path / LAST, {"weight": torch.zeros(1)}, _card(student, class_names or _names(classes)))
    if finished:
        last = _evaluation(history.row(-1, named=True))
        RunResult(
            name=name,
            student=student,
            parameters=parameters,
            loss=recipe.loss_name,
            epochs=epochs,
            seed=seed,
            folder=path,
            recipe_digest=recipe_digest(identity),
            fingerprint=None if loss == "ce" else FINGERPRINT,
            train_samples=1438,
            test_split="test",
            last=last,
            best=last,
            best_epoch=epochs - 1,
            teachers=None if loss == "ce" else TEACHERS,
            train_s=12.5 * epochs,
            environment={"device": "a CPU, 1 threads", "torch": "2.11.0"},
            command=command or f"train-student {name} --student {student} --seed {seed}",
        ).save()
    return path


def write_sweep(path: Path, students: dict[str, float], *, seeds: int = 3, losses: tuple[str, ...] = ("kd",)) -> Path:
    """Write a sweep: runs, and `trials.parquet` with their costs, one failed trial and one stopped trial.

    Args:
        students: name → top-1 of its first seed; the others lose half a point each.
    """
    rows = []
    for place, (student, top1) in enumerate(students.items()):
        for loss in losses:
            for seed in range(seeds):
                reached = top1 - 0.005 * seed - (0.02 if loss == "ce" else 0.0)
                parameters = 20_000 * 2**place
                write_run(
                    path / "trials" / f"{student}-{loss}-{seed}",
                    student=student,
                    loss=loss,
                    seed=seed,
                    top1=reached,
                    parameters=parameters,
                    epochs=20,
                )
                rows.append(_row(student, loss, seed, f"{path}/trials/{student}-{loss}-{seed}", parameters, place))
    write_run(path / "trials" / "stopped", student="ShuffleV1", top1=0.5, finished=False, epochs=20)
    rows.append(
        _row("ShuffleV1", "kd", 0, f"{path}/trials/stopped", None, 3)
        | {"status": "stopped", "error": "not among the best half"}
    )
    rows.append(
        _row("resnet110", "kd", 0, None, None, 8)
        | {"status": "failed", "error": "CUDA out of memory: tried to allocate 2.00 GiB", "flops": None}
    )
    pl.DataFrame(rows, infer_schema_length=None).write_parquet(path / "trials.parquet")
    return path


def _row(student: str, loss: str, seed: int, place: str | None, parameters: int | None, size: int) -> dict[str, Any]:
    measured = None if place is None else 1.5e6 * 2.2**size
    return {
        "trial": f"{student}-{loss}-{seed}", "student": student, "loss": loss, "seed": seed, "status": "finished",
        "error": None, "folder": place, "parameters": parameters, "flops": measured,
        "latency_1_ms": None if measured is None else 1.1 + 0.4 * size,
        "latency_128_ms": None if measured is None else 9.0 * 1.7**size, "top1": None, "top5": None, "nll": None,
        "ece": None, "best_epoch": None, "best_top1": None, "epochs_done": None, "train_s": None,
        "command": f"train-student digits --student {student} --loss {loss} --seed {seed}",
    }  # fmt: skip


def _names(classes: int) -> tuple[str, ...]:
    return tuple(f"class {label}" for label in range(classes))


def _card(student: str, names: tuple[str, ...]) -> StudentCard:
    return StudentCard(
        architecture=student,
        num_classes=len(names),
        class_names=names,
        image_size=(32, 32),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        dataset="digits",
    )


def _predictions(rng: np.random.Generator, top1: float, classes: int, n: int = 400) -> pl.DataFrame:
    label = rng.integers(0, classes, n)
    right = rng.permutation(n) < round(top1 * n)
    confidence = np.where(right, rng.beta(8, 1.2, n), rng.beta(3, 2, n)).clip(1 / classes, 1.0)
    return pl.DataFrame(
        {"label": label, "predicted": np.where(right, label, (label + 1) % classes), "confidence": confidence}
    )


def _history(epochs: int, top1: float) -> pl.DataFrame:
    epoch = np.arange(epochs)
    approach = 1 - np.exp(-4 * (epoch + 1) / max(epochs, 1))
    reached = (0.3 + (top1 - 0.3) * approach / approach[-1]) if epochs else epoch
    return pl.DataFrame(
        {
            "epoch": epoch,
            "loss": 4.0 - 3 * approach,
            "loss_ce": 1.0 - 0.7 * approach,
            "loss_logit": 3.0 - 2.3 * approach,
            "train_s": np.full(epochs, 12.5),
            "test_n": np.full(epochs, 400),
            "test_top1": reached,
            "test_top5": np.minimum(reached + 0.05, 1.0),
            "test_nll": 1.5 - reached,
            "test_ece": 0.2 - 0.15 * approach,
        }
    )


def _evaluation(row: dict[str, Any]) -> Evaluation:
    return Evaluation(**{name: row[f"test_{name}"] for name in ("n", "top1", "top5", "nll", "ece")})
