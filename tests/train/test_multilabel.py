"""Students of images with any number of labels: their loss, figures, tables and pages, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import average_precision_score

from cache_tools.config import validate
from cache_tools.errors import RecipeError
from cache_tools.images import open_images
from pipeline.build.cache import build_cache
from tests.support import multilabel, tiny_run
from train import checkpoints, losses
from train.checkpoints import load_student
from train.data import open_data
from train.evaluate.metrics import predict
from train.evaluate.multilabel import MultiLabelEvaluation
from train.feed import Batch, BatchTargets
from train.objective import Objective
from train.recipe import TrainRecipe
from train.recipe.loss import LossRecipe, named_loss
from train.run import train_student
from train.runs.result import load_result, summary
from train.sweep.halving import check_metric
from train.sweep.recipe import SweepRecipe, make_trials
from train.sweep.run import run_sweep
from train.sweep.text import sweep_text

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return multilabel.prepare(tmp_path_factory.mktemp("multilabel"))


@pytest.fixture(scope="module")
def cache(root: Path) -> Path:
    return build_cache(multilabel.build_recipe(root, root / "cache.zarr")).path


def recipe(cache: Path, out: Path, **changes: Any) -> TrainRecipe:
    return tiny_run.recipe(cache, out, **({"loss": named_loss("bce"), "epochs": 2} | changes))


def figures_of(run: Path, root: Path, name: str = checkpoints.LAST) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of the test split."""
    test = open_images(multilabel.dataset(root / "squares"), "test")
    student, _ = load_student(run / name)
    preprocessing = open_data(recipe(root / "cache.zarr", run), CPU).preprocessing
    return predict(student, test, preprocessing, CPU).double().numpy(), test.labels


def test_the_objective_is_cross_entropy_and_sigmoid_kd_of_every_class() -> None:
    generator = torch.Generator().manual_seed(0)
    student, target = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = (torch.rand(6, 4, generator=generator) < 0.4).to(torch.uint8)
    loss = LossRecipe(kind="bce", ce_weight=0.7, distill_weight=2.0, temperature=3.0)
    objective = Objective(loss, 5, 8, 4, 20, torch.zeros(20, 4))
    batch = Batch(torch.empty(0), labels, torch.arange(6), BatchTargets(target))
    terms = objective(student, None, batch)
    assert list(terms) == ["loss", "loss_ce", "loss_logit"]
    assert torch.equal(terms["loss_ce"], 0.7 * losses.binary_cross_entropy(student, labels))
    assert torch.equal(terms["loss_logit"], objective.logit_weight * losses.sigmoid_kd(student, target, 3.0))


def test_a_run_has_the_figures_of_several_labels_and_no_others(root: Path, cache: Path, tmp_path: Path) -> None:
    settings = {"ema_decay": 0.9, "compare_with_labels": True, "optimiser": {"accumulate": 2, "clip_grad_norm": 1.0}}
    result = train_student(recipe(cache, tmp_path / "run", **settings))
    assert load_result(tmp_path / "run") == result
    for name, found in ((checkpoints.LAST, result.last), (checkpoints.EMA, result.ema)):
        logits, labels = figures_of(tmp_path / "run", root, name)
        assert isinstance(found, MultiLabelEvaluation)
        assert found.map == pytest.approx(average_precision_score(labels, logits, average="macro"), abs=1e-6)
        p = 1 / (1 + np.exp(-logits))
        assert found.bce == pytest.approx(-np.mean(np.where(labels == 1, np.log(p), np.log(1 - p))), rel=1e-5)
    logits, labels = figures_of(tmp_path / "run", root)
    by_class = average_precision_score(labels, logits, average=None)
    assert result.average_precision == pytest.approx(dict(zip(multilabel.CLASSES, by_class, strict=True)), abs=1e-6)
    table = pl.read_parquet(tmp_path / "run" / "metrics.parquet")
    assert {"test_map", "test_bce", "ema_map", "loss_ce", "loss_logit"} <= {*table.columns}
    assert not [name for name in table.columns if "top1" in name or "ece" in name or "nll" in name]
    assert table["updates"].to_list() == [2, 4]
    assert result.best is not None
    assert result.best.headline == pytest.approx(max(table["test_map"]))
    assert not (tmp_path / "run" / "test.parquet").exists()
    assert "NaN" not in (tmp_path / "run" / "result.json").read_text()

    twin = result.labels_only
    assert twin is not None
    assert twin.loss == "bce-labels"
    assert result.last is not None
    assert twin.last is not None
    lines = summary(result).splitlines()
    assert lines[0].split() == ["mAP", "BCE"]
    assert f"{result.last.headline:.2%}" in lines[1]
    assert f"{100 * (result.last.headline - twin.last.headline):+.2f} points of mAP" in summary(result)
    assert "top-1" not in summary(result)

    page = (tmp_path / "run" / "report.html").read_text()
    assert "mAP %" in page
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert data["figure"] == {"key": "map", "name": "mAP"}
    shown = {setting["label"]: setting["top1"]["mean"] for setting in data["settings"]}
    assert sorted(shown.values()) == pytest.approx(sorted([result.last.headline, twin.last.headline]))
    assert "<td" in page
    assert f"{100 * result.last.headline:.2f}" in page
    assert "Top-1 %</button>" not in page


def test_a_run_on_labels_alone_needs_no_cache(root: Path, tmp_path: Path) -> None:
    data = {"loss": named_loss("bce-labels"), "dataset": multilabel.dataset(root / "squares").model_dump()}
    result = train_student(recipe(tmp_path / "none", tmp_path / "run", **data))
    assert (result.loss, result.fingerprint) == ("bce-labels", None)
    logits, labels = figures_of(tmp_path / "run", root)
    assert result.last is not None
    assert result.last.headline == pytest.approx(average_precision_score(labels, logits, average="macro"), abs=1e-6)


def test_an_interrupted_run_continues_exactly(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_student(recipe(cache, tmp_path / "through", ema_decay=0.9))
    save = checkpoints.save_state

    def stop(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            train_student(recipe(cache, tmp_path / "resumed", ema_decay=0.9))
    train_student(recipe(cache, tmp_path / "resumed", ema_decay=0.9))
    for name in (checkpoints.LAST, checkpoints.BEST, checkpoints.EMA):
        assert (tmp_path / "through" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


@pytest.mark.medium
def test_a_sweep_compares_by_average_precision(cache: Path, tmp_path: Path) -> None:
    base = recipe(cache, tmp_path / "unused", epochs=1).model_dump(mode="json") | {"out": None}
    sweep = validate(SweepRecipe, {"name": "squares", "base": base, "losses": ["bce", "bce-labels"]}, where="sweep")
    result = run_sweep(sweep, tmp_path / "sweep")
    by_loss = {row["loss"]: row for row in result.trials.iter_rows(named=True)}
    assert set(by_loss) == {"bce", "bce-labels"}
    for row in by_loss.values():
        stored = load_result(Path(row["folder"]))
        assert stored is not None
        assert stored.last is not None
        assert (row["map"], row["top1"]) == (stored.last.headline, None)
    assert by_loss["bce"]["gain"] == pytest.approx(by_loss["bce"]["map"] - by_loss["bce-labels"]["map"])
    assert result.settings["map"].to_list() == sorted(result.settings["map"].to_list(), reverse=True)
    text = sweep_text(result, sweep)
    assert "mAP %" in text
    assert "top-1" not in text
    assert f"{100 * by_loss['bce']['map']:.2f}" in text
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "mAP %" in page


def test_a_metric_of_one_label_is_refused_for_several(cache: Path, tmp_path: Path) -> None:
    base = recipe(cache, tmp_path / "unused").model_dump(mode="json") | {"out": None}
    sweep = validate(SweepRecipe, {"name": "squares", "base": base, "losses": ["bce"]}, where="sweep")
    trials = make_trials(sweep, tmp_path / "sweep")
    check_metric("test_map", trials, "asha")
    for metric in ("test_top1", "test_ece", "test_nll"):
        with pytest.raises(RecipeError, match=f"no {metric} for images with any number of labels.*test_map, test_bce"):
            check_metric(metric, trials, "asha")
    one = validate(SweepRecipe, {"name": "tiny", "base": base, "losses": ["kd"]}, where="sweep")
    with pytest.raises(RecipeError, match="no test_map for images with one label"):
        check_metric("test_map", make_trials(one, tmp_path / "sweep"), "asha")


@pytest.mark.parametrize("loss", ["ce", "kd", "dkd", "richkd"])
def test_losses_of_one_label_are_refused(root: Path, cache: Path, tmp_path: Path, loss: str) -> None:
    data = {"loss": named_loss(loss), "dataset": multilabel.dataset(root / "squares").model_dump()}
    with pytest.raises(RecipeError, match=r"the loss .* is for images with one label each.*--loss bce"):
        train_student(recipe(cache, tmp_path / "run", **data))


def test_several_labels_are_for_their_loss_alone(tmp_path: Path) -> None:
    data = {"loss": named_loss("bce-labels"), "dataset": {"name": "digits"}}
    with pytest.raises(RecipeError, match=r"bce-labels is for images with any number of labels each.*dataset.labels"):
        train_student(recipe(tmp_path / "none", tmp_path / "run", **data))


def test_a_part_of_the_labels_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a fraction of the labels is drawn class by class"):
        train_student(recipe(cache, tmp_path / "run", label_fraction=0.5))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"feature": "crd"}, "another feature than crd"),
        ({"label_smoothing": 0.1}, "no label_smoothing with bce"),
        ({"class_weights": "balanced"}, "no class_weights with bce"),
    ],
)
def test_settings_of_one_label_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        validate(LossRecipe, {"kind": "bce", **changes}, where="loss")


@pytest.mark.parametrize("feature", ["mse", "cosine", "rkd", "pkt"])
def test_other_feature_terms_work(cache: Path, tmp_path: Path, feature: str) -> None:
    loss = {**named_loss("bce"), "feature": feature}
    data = open_data(recipe(cache, tmp_path / "run", loss=loss), CPU)
    batch = next(iter(data.feed(recipe(cache, tmp_path / "run", loss=loss), CPU).epoch(0)))
    assert batch.labels.shape == (16, 4)
    objective = Objective(LossRecipe(**loss), 16, data.target_dim, 4, len(data.images), data.labels)
    terms = objective(torch.randn(16, 4), torch.randn(16, 16), batch)
    assert bool(terms["loss"].isfinite())
