"""The predictions of a run's last weights for each test image, for reliability diagrams and accuracies by class."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import nn

from cache_tools.decoding.service import load_canvases
from cache_tools.errors import DataError
from cache_tools.format.recipe import Preprocessing
from cache_tools.images.image_set import ImageSet
from cache_tools.preprocess import prepare
from train.evaluate.metrics import CALIBRATION_BINS, batches, evaluating
from train.runs.folder import PREDICTIONS
from train.weights.run_files import read_parquet_file, write_file

_COLUMNS = {"label": pl.UInt32, "predicted": pl.UInt32, "confidence": pl.Float32}


def store_predictions(
    folder: Path,
    model: nn.Module,
    images: ImageSet | None,
    preprocessing: Preprocessing,
    device: torch.device,
    batch_size: int = 512,
) -> None:
    """Write `test.parquet` into a run folder: a row per test image, in the split's order; nothing without a test split.

    Columns: label and predicted (uint32), confidence (float32, the probability of the predicted class).
    """
    if images is None:
        return
    rows = []
    with evaluating(model, device):
        for _, pixels in batches(load_canvases(images), range(len(images)), batch_size, device):
            rows.append(model(prepare(pixels, preprocessing)).float().softmax(dim=1).max(dim=1))
    table = {
        "label": np.asarray(images.labels),
        "predicted": torch.cat([row.indices for row in rows]).cpu().numpy(),
        "confidence": torch.cat([row.values for row in rows]).clamp_max(1.0).cpu().numpy(),
    }
    write_predictions(folder, pl.DataFrame(table))


def write_predictions(folder: Path, predictions: pl.DataFrame) -> None:
    """Write a table with label, predicted and confidence as `test.parquet`, atomically."""
    buffer = io.BytesIO()
    _typed(predictions).write_parquet(buffer, compression="zstd")
    write_file(folder / PREDICTIONS, buffer.getbuffer())


def read_predictions(folder: Path, num_classes: int | None = None) -> pl.DataFrame | None:
    """Read the table of `store_predictions`; None if a run has none (no test split, or an earlier version).

    Args:
        num_classes: labels and predictions must be below it; None if it is not known.

    Raises:
        DataError: a damaged file.
    """
    path, next_step = folder / PREDICTIONS, "delete the file to make the page without them"
    table = read_parquet_file(path, "predictions", _COLUMNS, next_step)
    if table is not None and (problem := _problem(table, num_classes)) is not None:
        raise DataError("damaged predictions", where=path, found=problem, next_step=next_step)
    return table


def _problem(table: pl.DataFrame, num_classes: int | None) -> str | None:
    """Why a table does not hold predictions of so many classes; None if it does."""
    if any(table.null_count().row(0)):
        return "missing values"
    if not table["confidence"].is_between(0.0, 1.0).all():
        return "a confidence outside 0 to 1"
    largest = max(int(table[name].to_numpy().max(initial=0)) for name in ("label", "predicted"))
    return f"class {largest} of {num_classes}" if num_classes is not None and largest >= num_classes else None


def reliability(predictions: pl.DataFrame, bins: int = CALIBRATION_BINS) -> pl.DataFrame:
    """Accuracy by confidence, the data of a reliability diagram.

    Returns:
        A row per bin [k ⁄ bins, (k + 1) ⁄ bins) of the confidence, the last one including 1.0: count, and the means
        confidence and accuracy, null in an empty bin. Σ count · |accuracy − confidence| ⁄ Σ count is the ECE.
    """
    edges = np.linspace(0, 1, bins + 1, dtype=np.float32)
    confidence = predictions["confidence"].to_numpy()
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    right = (predictions["label"] == predictions["predicted"]).to_numpy()
    count = np.bincount(place, minlength=bins)
    sums = {
        "confidence": np.bincount(place, weights=confidence, minlength=bins),
        "accuracy": np.bincount(place, weights=right, minlength=bins),
    }
    means = {name: np.divide(total, count, out=np.full(bins, np.nan), where=count > 0) for name, total in sums.items()}
    return pl.DataFrame({"count": count, **means}).with_columns(pl.col("confidence", "accuracy").fill_nan(None))


def class_accuracy(predictions: pl.DataFrame, num_classes: int) -> pl.DataFrame:
    """A row per class: count, and accuracy, the fraction of its images that are recognised (null without images)."""
    labels = predictions["label"].to_numpy()
    right = (predictions["label"] == predictions["predicted"]).to_numpy()
    count = np.bincount(labels, minlength=num_classes)
    correct = np.bincount(labels, weights=right, minlength=num_classes)
    accuracy = np.divide(correct, count, out=np.full(len(count), np.nan), where=count > 0)
    return pl.DataFrame({"count": count, "accuracy": accuracy}).with_columns(pl.col("accuracy").fill_nan(None))


def _typed(table: pl.DataFrame) -> pl.DataFrame:
    return table.select(pl.col(name).cast(dtype) for name, dtype in _COLUMNS.items())
