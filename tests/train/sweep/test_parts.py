"""Sweeps on a part of the cached samples, with another test split, and on views smaller than the canvas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny_run
from train.run import train_student
from train.runs.result import load_result
from train.sweep.recipe import SweepRecipe, Trial, make_trials
from train.sweep.run import run_sweep


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    return tiny_run.write_cache(root / "tiny.zarr", tiny_run.write_pictures(root / "pictures"))


def trials_of(cache: Path, folder: Path, dataset: dict[str, Any]) -> tuple[SweepRecipe, list[Trial]]:
    base = tiny_run.recipe(cache, Path("unused"), epochs=1, dataset=dataset, loggers=())
    sweep = SweepRecipe(name="parts", base=base.model_dump(mode="json"), losses=("kd", "ce"))
    return sweep, make_trials(sweep, folder)


@pytest.mark.medium
def test_trials_on_a_part_equal_single_runs(cache: Path, tmp_path: Path) -> None:
    """With targets and on labels alone: the same images, tested on the same split, and the same figures."""
    sweep, trials = trials_of(cache, tmp_path / "sweep", {"split": "train[::2]", "test_split": "train[1::2]"})
    run_sweep(sweep, tmp_path / "sweep")
    for trial in trials:
        result = load_result(trial.folder)
        assert result is not None
        assert result.last is not None
        assert (result.train_samples, result.test_split, result.last.n) == (25, "train[1::2]", 25)
        alone = train_student(trial.recipe.model_copy(update={"out": tmp_path / f"alone-{trial.loss}"}))
        assert alone.last == result.last


def test_a_grid_may_vary_the_part(cache: Path, tmp_path: Path) -> None:
    """Two folds in one sweep; each trial on labels alone has the part of its own."""
    base = tiny_run.recipe(cache, Path("unused"), epochs=1)
    sweep = SweepRecipe(
        name="folds",
        base=base.model_dump(mode="json"),
        losses=("kd", "ce"),
        grid={"dataset.split": ("train[::2]", "train[1::2]")},
    )
    trials = make_trials(sweep, tmp_path)
    assert len({str(trial.recipe.values()) for trial in trials}) == 4
    on_labels = [trial.recipe.own_dataset().split for trial in trials if trial.loss == "ce"]
    assert on_labels == ["train[::2]", "train[1::2]"]


def test_a_kind_of_loss_in_a_grid_takes_the_images_of_the_cache(cache: Path, tmp_path: Path) -> None:
    base = tiny_run.recipe(cache, Path("unused"), epochs=1)
    sweep = SweepRecipe(name="kinds", base=base.model_dump(mode="json"), grid={"loss.kind": ("kd", "ce")})
    _, on_labels = make_trials(sweep, tmp_path)
    assert (on_labels.recipe.own_dataset().name, on_labels.recipe.num_views) == ("folder", 3)
