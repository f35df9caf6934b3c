"""The stored predictions of a run are those of its weights, and give the run's own ECE and accuracy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from cache_tools.errors import DataError
from cache_tools.images import open_images
from cache_tools.images.image_set import ImageSet
from tests.support import tiny_run
from train.checkpoints import LAST, load_student
from train.data import open_data
from train.evaluate.metrics import predict
from train.recipe import TrainRecipe
from train.run import train_student
from train.runs.predictions import class_accuracy, read_predictions, reliability, store_predictions, write_predictions
from train.runs.result import RunResult

CPU = torch.device("cpu")


Trained = tuple[TrainRecipe, RunResult, ImageSet]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A trained run, its result and its test images."""
    folder = tmp_path_factory.mktemp("predictions")
    pictures = tiny_run.write_pictures(folder / "pictures", test=61)
    recipe = tiny_run.recipe(tiny_run.write_cache(folder / "tiny.zarr", pictures), folder / "run")
    return recipe, train_student(recipe), open_images(tiny_run.dataset(pictures), "test")


def test_a_run_stores_the_predictions_of_its_last_weights(run: Trained) -> None:
    recipe, result, images = run
    student, _ = load_student(result.folder / LAST)
    logits = predict(student, images, open_data(recipe, CPU).preprocessing, CPU).double()
    probabilities = logits.softmax(1)
    table = read_predictions(result.folder)
    assert table is not None
    assert table["label"].to_list() == images.labels.tolist()
    assert table["predicted"].to_list() == probabilities.argmax(1).tolist()
    np.testing.assert_allclose(table["confidence"], probabilities.max(1).values, rtol=1e-5)


def test_reliability_and_classes_add_up_to_the_result(run: Trained) -> None:
    _, result, images = run
    table = read_predictions(result.folder)
    assert table is not None
    assert result.last is not None
    bins = reliability(table)
    gaps = (bins["accuracy"] - bins["confidence"]).abs() * bins["count"]
    assert gaps.sum() / table.height == pytest.approx(result.last.ece, abs=1e-5)
    classes = class_accuracy(table, 3)
    assert classes["count"].to_list() == np.bincount(images.labels).tolist()
    correct = (classes["accuracy"] * classes["count"]).sum()
    assert correct / table.height == pytest.approx(result.last.top1, abs=1e-6)


def test_bins_by_hand() -> None:
    table = pl.DataFrame(
        {"label": [0, 1, 2, 0, 1], "predicted": [0, 1, 0, 0, 2], "confidence": [1.0, 0.95, 0.5, 0.55, 0.25]}
    )
    bins = reliability(table, bins=5)
    assert bins["count"].to_list() == [0, 1, 2, 0, 2]
    assert bins["accuracy"].to_list() == [None, 0.0, 0.5, None, 1.0]
    assert bins["confidence"].to_list()[2:] == pytest.approx([0.525, None, 0.975])
    classes = class_accuracy(table, 4)
    assert classes["count"].to_list() == [2, 2, 1, 0]
    assert classes["accuracy"].to_list() == [1.0, 0.5, 0.0, None]


def test_without_a_test_split_nothing_is_stored(run: Trained, tmp_path: Path) -> None:
    recipe, _, _ = run
    assert recipe.out is not None
    student, _ = load_student(recipe.out / LAST)
    store_predictions(tmp_path, student, None, open_data(recipe, CPU).preprocessing, CPU)
    assert list(tmp_path.iterdir()) == []
    assert read_predictions(tmp_path) is None


def test_the_file_of_ten_thousand_images_is_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 1000, 10_000)
    columns = {"label": labels, "predicted": labels, "confidence": rng.random(10_000)}
    write_predictions(tmp_path, pl.DataFrame(columns))
    assert (tmp_path / "test.parquet").stat().st_size < 80_000


@pytest.mark.parametrize("damage", ["cut off", "another table"])
def test_a_damaged_file_is_an_error_of_one_line(run: Trained, tmp_path: Path, damage: str) -> None:
    _, result, _ = run
    file = tmp_path / "test.parquet"
    file.write_bytes((result.folder / "test.parquet").read_bytes()[:100])
    if damage == "another table":
        pl.DataFrame({"label": [1]}).write_parquet(file)
    with pytest.raises(DataError, match="damaged predictions") as caught:
        read_predictions(tmp_path)
    assert "\n" not in str(caught.value)
