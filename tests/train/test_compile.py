"""`--compile`: every loss and codec is one graph, compiled and captured steps give the plain loop's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_tools.codecs import Codec, Companded, FeatureSteps, FixedStep, Float16, Float32, RowStep, Sampled, TopK
from cache_tools.errors import RecipeError
from cache_tools.reader import TeacherCache
from tests.support import cache_factory, tiny_run
from tests.train.test_graph import make_learner
from tests.train.test_loop import CLASSES, SAMPLES, assert_same
from train.loop import Learner, explain_failure, model_inputs, repeatable, train_epoch
from train.run import run_device, train_student

CPU = torch.device("cpu")
CODECS: list[Codec] = [
    Float16(), Float32(), FixedStep(), RowStep(), Companded(), Companded(reference="mean"), FeatureSteps(),
    TopK(num_classes=20), Sampled(num_classes=20),
]  # fmt: skip
KINDS = ("ce", "kd", "dkd", "standardised_kd", "standardised_dkd")
FEATURES = ("none", "mse", "cosine", "rkd", "pkt", "crd")


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    torch._dynamo.reset()
    with repeatable(CPU, False):
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    path = tmp_path_factory.mktemp("compile") / "c.zarr"
    images = cache_factory.tiny_images(SAMPLES, CLASSES)
    cache_factory.build(path, cache_factory.tiny_manifest(images, codec="float32"), images)
    return TeacherCache.open(path)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("kind", "feature"), [("kd", feature) for feature in FEATURES] + [(kind, "mse") for kind in KINDS]
)
def test_student_and_loss_are_one_graph(cache: TeacherCache, kind: str, feature: str) -> None:
    loss = {"kind": kind, "feature": feature, "crd_negatives": 8, "crd_dim": 4, "label_smoothing": 0.1}
    learner, feed = make_learner(cache, CPU, loss=loss)
    batch = next(iter(feed.epoch(0)))
    feed.close()
    learner.begin_epoch(0)
    found = torch._dynamo.explain(learner._terms)(model_inputs(batch, learner.preprocessing), batch, None)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.medium
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.codec)
def test_a_codec_decodes_in_one_graph(codec: Codec) -> None:
    rows = np.random.default_rng(0).normal(0, 3, (12, 20)).astype(np.float32)
    fitted = codec.fit(rows)
    stored = {suffix: torch.from_numpy(array) for suffix, array in codec.encode(rows, fitted).items()}
    constants = {suffix: torch.from_numpy(array) for suffix, array in fitted.items()}
    found = torch._dynamo.explain(codec.decode)(stored, constants, torch.arange(5))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def train(learner: Learner, feed: Any, epochs: int = 2) -> list[Any]:
    figures = [train_epoch([learner], feed, epoch, lambda count: None) for epoch in range(epochs)]
    feed.close()
    assert not any(isinstance(one, Exception) for (one,) in figures), figures
    return figures


@pytest.mark.medium
def test_a_compiled_run_equals_the_plain_one(cache: TeacherCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and run operation by operation: all but the code that a compiler would write for it."""
    loss = {"kind": "kd", "feature": "crd", "crd_negatives": 8, "crd_dim": 4}
    plain, feed = make_learner(cache, CPU, loss=loss)
    expected = train(plain, feed)
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend="eager", **options))
    compiled, feed = make_learner(cache, CPU, loss=loss, compile="model")
    assert train(compiled, feed) == expected
    assert_same(dict(plain.state_dict()), dict(compiled.state_dict()))


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["none", "mse", "crd"])
def test_compiled_kernels_differ_by_rounding(cache: TeacherCache, feature: str) -> None:
    loss = {"kind": "kd", "feature": feature, "crd_negatives": 8, "crd_dim": 4}
    runs = [make_learner(cache, CPU, loss=loss, compile=mode) for mode in ("off", "model")]
    for learner, _ in runs:
        learner.student.get_submodule("drop").p = 0.0  # type: ignore[assignment]  # a compiler draws other numbers
    for learner, feed in runs:
        train(learner, feed)
    plain, compiled = (learner.student.state_dict() for learner, _ in runs)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)


def test_captured_updates_go_through_the_same_epoch(cache: TeacherCache) -> None:
    """On the CPU the updates are not captured, but everything else is as on CUDA. It resumes inside an update."""
    settings = {"loss": {"kind": "kd"}, "optimiser": {"accumulate": 2}}
    plain, feed = make_learner(cache, CPU, **settings)
    saved: list[Any] = []
    first = train_epoch([plain], feed, 0, lambda count: None, save=lambda states: saved.append(copy.deepcopy(states())))
    expected = [first, train_epoch([plain], feed, 1, lambda count: None)]
    feed.close()

    captured, feed = make_learner(cache, CPU, **settings, compile="step")
    assert train(captured, feed) == expected
    assert_same(dict(plain.state_dict()), dict(captured.state_dict()))

    (begun,) = saved[2]
    resumed, feed = make_learner(cache, CPU, **settings, compile="step")
    resumed.load_state_dict(begun.pop("learner"))
    seen: list[int] = []
    outcomes = [train_epoch([resumed], feed, 0, seen.append, begun=[begun])]
    outcomes.append(train_epoch([resumed], feed, 1, lambda count: None))
    feed.close()
    assert (begun["batches"], sum(seen)) == (3, SAMPLES - 48)
    assert outcomes == expected
    assert_same(dict(plain.state_dict()), dict(resumed.state_dict()))


def test_a_captured_step_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    recipe = tiny_run.recipe(tmp_path / "none.zarr", tmp_path / "run", compile="step", device="cpu")
    with pytest.raises(RecipeError, match=r"captured step needs CUDA.*--compile model or off"):
        run_device(recipe)


def test_the_mode_is_not_part_of_a_run_and_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend="eager", **options))
    path = tiny_run.write_cache(tmp_path / "tiny.zarr", tiny_run.write_pictures(tmp_path / "pictures"))
    plain = tiny_run.recipe(path, tmp_path / "run", epochs=1)
    compiled = tiny_run.recipe(path, tmp_path / "compiled", epochs=1, compile="model")
    assert plain.values() == compiled.values()
    results = [train_student(recipe) for recipe in (plain, compiled)]
    assert results[0].recipe_digest == results[1].recipe_digest
    assert [result.environment.get("compile") for result in results] == [None, "model"]


def test_what_cannot_be_compiled_is_an_error_with_advice() -> None:
    recipe = tiny_run.recipe(Path("c.zarr"), Path("run"), compile="model")
    with (
        pytest.raises(RecipeError, match=r"cannot be compiled.*no compiler.*--compile off"),
        explain_failure(recipe, CPU),
    ):
        raise torch._dynamo.exc.InternalTorchDynamoError("no compiler")
