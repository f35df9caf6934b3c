"""Check the metric of halving and search: some need a test split or averaged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cache_tools.errors import RecipeError
from tests.support import tiny_run
from train.sweep.halving import Halving, check_metric
from train.sweep.recipe import Asha, SweepRecipe, Trial, make_trials
from train.sweep.run import run_sweep


@pytest.fixture(scope="module", params=["labels", "targets"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe without a test split."""
    folder = tmp_path_factory.mktemp("tiny")
    pictures = tiny_run.write_pictures(folder / "pictures")
    dataset = tiny_run.dataset(pictures).model_copy(update={"test_split": None})
    if request.param == "labels":
        changes: dict[str, Any] = {"loss": {"kind": "ce"}, "dataset": dataset}
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny_run, "dataset", lambda pictures: dataset)
            tiny_run.write_cache(folder / "tiny.zarr", pictures)
        changes = {}
    return tiny_run.recipe(folder / "tiny.zarr", folder, **changes).model_dump(mode="json")


def trials(base: dict[str, Any], **changes: Any) -> list[Trial]:
    sweep = SweepRecipe(name="tiny", base={**base, **changes}, grid={"lr": (0.1, 0.2)})
    return make_trials(sweep, Path("sweep"))


@pytest.mark.parametrize("metric", ["test_top1", "test_nll"])
def test_test_metrics_need_a_test_split(base: dict[str, Any], metric: str) -> None:
    with pytest.raises(RecipeError, match=f"no {metric} without a test split.*asha: {{metric: loss}}"):
        check_metric(metric, trials(base), "asha")


def test_ema_metrics_need_averaged_weights_and_a_test_split(base: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="no ema_top1 without averaged weights"):
        check_metric("ema_top1", trials(base), "asha")
    with pytest.raises(RecipeError, match="no ema_top1 without a test split"):
        check_metric("ema_top1", trials(base, ema_decay=0.9), "asha")


def test_a_training_metric_needs_neither(base: dict[str, Any]) -> None:
    assert len(Halving.of_trials(trials(base), Asha(metric="loss")).folders) == 2


@pytest.mark.parametrize("kind", ["asha", "search"])
def test_a_bad_metric_is_refused_before_training(base: dict[str, Any], tmp_path: Path, kind: str) -> None:
    if kind == "search":
        pytest.importorskip("optuna")
    sweep = SweepRecipe.model_validate({"name": "tiny", "base": base, "grid": {"lr": (0.1, 0.2)}, kind: {}})
    with pytest.raises(RecipeError, match=f"no test_top1 without a test split.*{kind}: {{metric: loss}}"):
        run_sweep(sweep, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
