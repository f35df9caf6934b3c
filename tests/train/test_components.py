"""CRD on the teacher and CLIP features of a component cache: which features, which mix, exact resume, live teachers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from cache_tools.errors import RecipeError
from cache_tools.reader import TeacherCache
from pipeline.build.cache import build_cache
from pipeline.networks.ensemble import load_ensemble
from pipeline.online import LiveTeachers
from tests.support import tiny_build, tiny_run
from train import checkpoints
from train.cli import app
from train.data import open_data
from train.losses.contrastive import Components
from train.recipe.loss import LossRecipe
from train.run import train_on, train_student

CPU = torch.device("cpu")
RICHKD = {"kind": "kd", "feature": "crd", "crd_dim": 8}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> dict[str, Path]:
    """A cache of fused targets and one of components, of the same images."""
    root = tmp_path_factory.mktemp("caches")
    return {
        store: tiny_run.write_cache(root / f"{store}.zarr", pictures, store=store) for store in ("fused", "components")
    }


def test_the_feed_has_the_features_of_each_network(caches: dict[str, Path], tmp_path: Path) -> None:
    recipe = tiny_run.recipe(caches["components"], tmp_path, loss=RICHKD)
    data = open_data(recipe, CPU)
    assert data.components is not None
    assert data.components.widths == (12, 10)
    assert data.components.weights == pytest.approx((0.7, 0.3))
    index = torch.tensor([4, 0, 31])
    targets = data.targets.view(2).batch(index, torch.empty(0))
    cache = TeacherCache.open(caches["components"])
    assert targets.features is None, "the loss does not use the fused features"
    assert targets.components is not None
    for values, name in zip(targets.components, ("teacher_features", "clip_features"), strict=True):
        stored = torch.from_numpy(cache.read_array(name, 2)[[4, 0, 31]]).float()
        assert torch.equal(values, stored), name
    assert isinstance(targets.logits, torch.Tensor)
    assert torch.equal(targets.logits, cache.load_view(2).logits(index))


@pytest.mark.parametrize(
    ("store", "loss", "used"),
    [
        ("components", {}, True),
        ("components", {"feature_source": "components"}, True),
        ("components", {"feature_source": "fused"}, False),
        ("components", {"feature": "cosine"}, False),
        ("components", {"feature": "none"}, False),
        ("components", {"feature_weight": 0.0}, False),
        ("fused", {}, False),
    ],
)
def test_when_components_are_used(
    caches: dict[str, Path], tmp_path: Path, store: str, loss: dict[str, Any], used: bool
) -> None:
    data = open_data(tiny_run.recipe(caches[store], tmp_path, loss=RICHKD | loss), CPU)
    assert (data.components is not None) == used
    targets = data.targets.view(0).batch(torch.arange(3), torch.empty(0))
    assert (targets.components is not None) == used
    uses_fused = not used and LossRecipe(**(RICHKD | loss)).needs_features
    assert (targets.features is not None) == uses_fused


def test_the_feature_weight_of_the_fusion_sets_the_mix(caches: dict[str, Path], tmp_path: Path) -> None:
    fusion = {"feature_weight": 1.0, "teacher_weight": 0.2}
    recipe = tiny_run.recipe(caches["components"], tmp_path / "run", loss=RICHKD, fusion=fusion, epochs=1)
    data = open_data(recipe, CPU)
    assert data.components == Components((12, 10), (1.0, 0.0))
    train_student(recipe)
    assert embedded(tmp_path / "run") == {"student": 64, "targets.0": 12}, "a network of weight 0 has no embedding"


def test_a_run_learns_an_embedding_per_network(caches: dict[str, Path], tmp_path: Path) -> None:
    result = train_student(tiny_run.recipe(caches["components"], tmp_path / "own", loss=RICHKD, epochs=1))
    assert result.loss == "kd+crd"
    assert embedded(tmp_path / "own") == {"student": 64, "targets.0": 12, "targets.1": 10}
    fused = RICHKD | {"feature_source": "fused"}
    train_student(tiny_run.recipe(caches["components"], tmp_path / "fused", loss=fused, epochs=1))
    assert embedded(tmp_path / "fused") == {"student": 64, "targets.0": 8}


def test_an_interrupted_run_resumes_exactly(
    monkeypatch: pytest.MonkeyPatch, caches: dict[str, Path], tmp_path: Path
) -> None:
    def run(name: str) -> tuple[dict[str, Any], list[float]]:
        train_student(tiny_run.recipe(caches["components"], tmp_path / name, loss=RICHKD))
        state = checkpoints.load_state(tmp_path / name / "state.pt")
        assert state is not None
        return state["learner"], pl.read_parquet(tmp_path / name / "metrics.parquet")["loss"].to_list()

    straight, losses = run("straight")
    save, calls = checkpoints.save_state, []

    def stop_after_two(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_state", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run("interrupted")
    monkeypatch.undo()
    resumed, again = run("interrupted")
    assert again == losses
    for part in ("student", "objective"):
        assert straight[part].keys() == resumed[part].keys()
        for name, value in straight[part].items():
            assert torch.equal(value, resumed[part][name]), name
    assert "contrast.memory.memory_target" in straight["objective"]


def test_live_teachers_give_the_same_run(tmp_path: Path) -> None:
    """A float32 component cache of real networks equals the same networks in the training process."""
    root = tiny_build.prepare(tmp_path, train=96)
    build = tiny_build.recipe(root, store="components", num_views=2)
    built = build_cache(build)
    losses = {}
    for name in ("cached", "live"):
        recipe = tiny_run.recipe(built.path, tmp_path / name, loss=RICHKD, epochs=2, batch_size=32)
        data = open_data(recipe, CPU)
        if name == "live":
            ensemble = load_ensemble(build.teacher, build.clip, build.fusion, data.images, data.dataset, CPU, "float32")
            data = replace(data, targets=LiveTeachers(ensemble), cache=None)
        train_on(data, recipe, CPU)
        losses[name] = pl.read_parquet(tmp_path / name / "metrics.parquet")["loss_feature"].to_list()
    assert losses["cached"] == losses["live"]


def test_a_fused_cache_has_no_components(caches: dict[str, Path], tmp_path: Path) -> None:
    loss = RICHKD | {"feature_source": "components"}
    with pytest.raises(RecipeError, match=r"has only fused targets.*found fused_logits, fused_features.*--store"):
        open_data(tiny_run.recipe(caches["fused"], tmp_path, loss=loss), CPU)


def test_the_error_says_which_features_the_cache_has(caches: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    arguments = ["--cache", str(caches["fused"]), "--loss", "richkd", "--set", "loss.feature_source=components"]
    failed = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "run"), "--data-dir", str(pictures)])
    assert failed.exit_code == 2
    assert failed.stdout == ""
    assert len(failed.stderr.strip().splitlines()) == 1
    for words in (str(caches["fused"]), "fused_logits, fused_features", "feature_source=fused", "--store components"):
        assert words in failed.stderr
    assert not (tmp_path / "run").exists()


def embedded(run: Path) -> dict[str, int]:
    """Input width of each embedding of a finished run."""
    state = checkpoints.load_state(run / "state.pt")
    assert state is not None
    weights = {key: value for key, value in state["learner"]["objective"].items() if key.endswith(".weight")}
    return {
        key.removeprefix("contrast.embed_").removesuffix(".weight"): value.shape[1] for key, value in weights.items()
    }
