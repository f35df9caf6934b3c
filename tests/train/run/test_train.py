"""Whole runs: their files, that they repeat, that they resume after any interruption, and their errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from cache_tools.errors import (
    CacheError,
    DataError,
    DeviceError,
    IncompleteError,
    MismatchError,
    NotFoundError,
    RecipeError,
    StorageError,
    WeightsError,
)
from cache_tools.images import open_images
from cache_tools.reader import TeacherCache
from tests.support import tiny_run
from tests.support.tiny_run import same_runs
from tests.support.turns import some
from train import checkpoints
from train.checkpoints import BEST, EMA, LAST, load_student, read_card
from train.data import open_data
from train.evaluate.metrics import evaluate
from train.feed import BatchTargets
from train.recipe import TrainRecipe
from train.run import state as run
from train.run import train_on, train_student
from train.runs import folder as run_files
from train.runs.metrics import RunLog
from train.runs.result import load_result, summary

CPU = torch.device("cpu")


@pytest.mark.medium
@pytest.mark.usefixtures("real_curves")
def test_a_run_writes_all_its_files(cache: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(cache, tmp_path / "run", ema_decay=0.9, loss={"kind": "kd", "feature": "cosine"})
    result = train_student(recipe)
    names = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
    assert names - {"tb", "trackers.json"} == {
        "recipe.yaml", "run.json", "cache.json", LAST, BEST, EMA, "state.pt", "metrics.parquet", "test.parquet",
        "curves.png", "result.json", "report.html",
    }  # fmt: skip
    assert load_result(tmp_path / "run") == result
    manifest = TeacherCache.open(cache).manifest
    stored = json.loads((tmp_path / "run" / "cache.json").read_text())
    assert stored["path"] == str(cache)
    assert stored["manifest"]["fingerprint"] == result.fingerprint == manifest.fingerprint
    assert result.teachers == manifest.provenance["preflight"]
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (result.epochs, result.train_samples, result.loss) == (3, 50, "kd+cosine")
    assert {"torch", "python", "device"} <= result.environment.keys()

    test = open_images(tiny_run.dataset(pictures), "test")
    for name, expected in ((LAST, result.last), (BEST, result.best), (EMA, result.ema)):
        student, card = load_student(tmp_path / "run" / name)
        assert card.class_names == tiny_run.CLASSES
        assert card.image_size == (tiny_run.SIDE, tiny_run.SIDE)
        assert expected is not None
        again = evaluate(student, test, open_data(recipe, CPU).preprocessing, CPU)
        assert (again.n, again.top1) == (expected.n, expected.top1)
        assert again.nll == pytest.approx(expected.nll, rel=1e-5)  # another memory layout rounds differently
    assert result.best_epoch is not None
    assert read_card(tmp_path / "run" / BEST).epoch == result.best_epoch + 1
    assert read_card(tmp_path / "run" / LAST).epoch == 3


def test_metrics_have_a_row_per_epoch(cache: Path, tmp_path: Path) -> None:
    result = train_student(tiny_run.recipe(cache, tmp_path / "run", epochs=5, evaluate_every=2))
    table = pl.read_parquet(tmp_path / "run" / "metrics.parquet")
    assert table["epoch"].to_list() == [0, 1, 2, 3, 4]
    assert table["updates"].to_list() == [4, 8, 12, 16, 20]
    assert [top1 is not None for top1 in table["test_top1"]] == [False, True, False, True, True]
    np.testing.assert_allclose(table["loss"], table["loss_ce"] + table["loss_logit"], rtol=1e-5)
    best = max(zip(table["test_top1"].fill_null(-1), -table["epoch"], strict=True))
    assert result.best is not None
    assert (result.best.top1, result.best_epoch) == (best[0], -best[1])
    assert result.train_s == pytest.approx(table["train_s"].sum())


@pytest.mark.medium
def test_tensorboard_events_match_the_metrics(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_student(tiny_run.recipe(cache, tmp_path / "run"))
    events = EventAccumulator(str(tmp_path / "run" / "tb"))
    events.Reload()
    table = pl.read_parquet(tmp_path / "run" / "metrics.parquet")
    for name in ("loss", "test_top1", "learning_rate"):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == table["epoch"].to_list()
        np.testing.assert_allclose([scalar.value for scalar in scalars], table[name], rtol=1e-6)


def test_a_run_without_tensorboard(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train_student(tiny_run.recipe(cache, tmp_path / "run", epochs=1)).last is not None
    assert not (tmp_path / "run" / "tb").exists()


@pytest.mark.medium
@pytest.mark.parametrize("loss", some([{"kind": "dkd", "feature": "crd"}, {"kind": "ce"}], 1), ids=["dkd+crd", "ce"])
def test_the_same_recipe_gives_the_same_files(
    cache: Path, pictures: Path, tmp_path: Path, loss: dict[str, Any]
) -> None:
    dataset = tiny_run.dataset(pictures).model_dump()
    for name in ("one", "two"):
        train_student(tiny_run.recipe(cache, tmp_path / name, loss=loss, dataset=dataset, ema_decay=0.8))
    same_runs(tmp_path / "one", tmp_path / "two")
    train_student(tiny_run.recipe(cache, tmp_path / "three", loss=loss, dataset=dataset, ema_decay=0.8, seed=1))
    assert (tmp_path / "one" / LAST).read_bytes() != (tmp_path / "three" / LAST).read_bytes()


@pytest.mark.medium
@pytest.mark.parametrize(
    "moment", some(["between best and state", "at the end", "before the first state", "after a state"], 2)
)
def test_an_interrupted_run_resumes(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path, moment: str) -> None:
    loss = {"kind": "kd", "feature": "crd", "label_smoothing": 0.1, "class_weights": "balanced"}
    optimiser = {"learning_rate": 0.05, "accumulate": 3, "clip_grad_norm": 1.0}

    def settings(name: str) -> TrainRecipe:
        return tiny_run.recipe(cache, tmp_path / name, loss=loss, optimiser=optimiser, ema_decay=0.9, epochs=4)

    train_student(settings("through"))
    moments: dict[str, tuple[Any, tuple[str, int]]] = {
        "before the first state": (checkpoints, ("save_state", 1)),
        "between best and state": (checkpoints, ("save_state", 3)),
        "after a state": (RunLog, ("write", 2)),
        "at the end": (run, ("draw_curves", 1)),
    }
    place, calls = moments[moment]
    name, count = calls
    with monkeypatch.context() as patch:
        interrupt(patch, place, name, count)
        with pytest.raises(KeyboardInterrupt):
            train_student(settings("resumed"))
    assert load_result(tmp_path / "resumed") is None
    train_student(settings("resumed"))
    same_runs(tmp_path / "through", tmp_path / "resumed")


KILLS = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.support import tiny_run
import train.run
from train.run import train_student  # before any computation, so that forking is safe

cache, out, epochs = Path(sys.argv[1]), Path(sys.argv[2]), 30
random.seed(int(sys.argv[3]))
settings = dict(
    loss={"kind": "kd", "feature": "crd", "label_smoothing": 0.1, "class_weights": "balanced"},
    optimiser={"learning_rate": 0.05, "accumulate": 3, "clip_grad_norm": 1.0},
    ema_decay=0.9,
    epochs=epochs,
)
state = out / "killed" / "state.pt"

def start(name):
    child = os.fork()
    if child == 0:
        inside = {"checkpoint_every_minutes": 1e-9} if name == "killed" else {}
        train_student(tiny_run.recipe(cache, out / name, **settings, **inside))
        os._exit(0)
    return child

def stamp():
    return state.stat().st_mtime_ns if state.exists() else 0

kills = 0
for attempt in range(7):
    child, before, patience = start("killed"), stamp(), time.monotonic() + 60
    if attempt % 3:  # after one or two more epochs; otherwise at any moment, even before the first epoch
        while stamp() == before and time.monotonic() < patience:
            time.sleep(0.001)
    time.sleep(random.uniform(0.0, 0.15))
    finished, _ = os.waitpid(child, os.WNOHANG)
    if not finished:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
assert kills >= 5, kills
assert not (out / "killed" / "result.json").exists()
epochs_before_last_start = len(torch.load(state, weights_only=True)["history"])
assert 0 < epochs_before_last_start < epochs, epochs_before_last_start
for name in ("killed", "through"):
    _, status = os.waitpid(start(name), 0)
    assert status == 0, (name, status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_a_killed_run_resumes_exactly(cache: Path, tmp_path: Path, seed: int) -> None:
    """After SIGKILL at seven moments the same command gives the same bytes as an uninterrupted run."""
    arguments = [sys.executable, "-c", KILLS, str(cache), str(tmp_path), str(seed)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    same_runs(tmp_path / "killed", tmp_path / "through")
    assert not list((tmp_path / "killed").glob("*.partial"))


@pytest.mark.medium
def test_a_finished_run_is_not_trained_again(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(cache, tmp_path / "run", compare_with_labels=True)
    result = train_student(recipe)
    monkeypatch.setattr(run, "first_student", None)
    assert train_student(recipe) == result
    assert train_student(recipe.model_copy(update={"device": "auto", "compare_with_labels": False})) == result
    with pytest.raises(TypeError):
        train_student(recipe, overwrite=True)


@pytest.mark.medium
def test_comparison_with_labels_is_the_same_run_on_labels(
    cache: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train_student(tiny_run.recipe(cache, tmp_path / "run", compare_with_labels=True))
    assert capsys.readouterr().err.count("pixels: in memory") == 1
    assert result.labels_only is not None
    assert result.labels_only.folder == tmp_path / "run" / "labels-only"
    views = TeacherCache.open(cache)
    alone = train_student(
        tiny_run.recipe(
            cache,
            tmp_path / "alone",
            loss={"kind": "ce"},
            dataset=tiny_run.dataset(pictures).model_dump(),
            views=views.recipe.views.model_dump(),
            num_views=views.num_views,
        )
    )
    same_runs(tmp_path / "run" / "labels-only", tmp_path / "alone")
    assert alone.last == result.labels_only.last
    assert alone.fingerprint is None
    text = summary(result)
    for words in ("teacher ", "CLIP ", "resnet8 distilled", "resnet8 on labels alone", "points of top-1", "75.00%"):
        assert words in text
    assert load_result(tmp_path / "run") == result


@pytest.mark.medium
def test_an_interrupted_comparison_resumes(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(cache, tmp_path / "run", compare_with_labels=True)
    with monkeypatch.context() as patch:
        interrupt(patch, checkpoints, "save_state", 5)  # after three epochs, in the second of the comparison
        with pytest.raises(KeyboardInterrupt):
            train_student(recipe)
    assert load_result(tmp_path / "run") is not None
    monkeypatch.setattr("train.run.train.command_line", lambda: "the same command")
    result = train_student(recipe)
    assert result.labels_only is not None
    assert len(pl.read_parquet(tmp_path / "run" / "labels-only" / "metrics.parquet")) == 3


@pytest.mark.medium
def test_a_folder_with_a_run_of_another_recipe_is_refused(cache: Path, tmp_path: Path) -> None:
    train_student(tiny_run.recipe(cache, tmp_path / "run"))
    other = tiny_run.recipe(cache, tmp_path / "run", epochs=1, optimiser={"learning_rate": 0.01})
    with pytest.raises(RecipeError, match=r"recipe\.epochs 3 there, 1 now.*learning_rate 0\.05 there.*--overwrite"):
        train_student(other)
    assert train_student(other, overwrite=True).epochs == 1
    assert train_student(other).epochs == 1


def test_another_cache_is_another_run(cache: Path, pictures: Path, tmp_path: Path) -> None:
    train_student(tiny_run.recipe(cache, tmp_path / "run"))
    moved = tmp_path / "moved.zarr"
    shutil.copytree(cache, moved)
    assert train_student(tiny_run.recipe(moved, tmp_path / "run")).fingerprint, "the same cache elsewhere is the same"
    rebuilt = tiny_run.write_cache(tmp_path / "rebuilt.zarr", pictures, codec="float32")
    with pytest.raises(RecipeError, match=r"data\.fingerprint"):
        train_student(tiny_run.recipe(rebuilt, tmp_path / "run"))


@pytest.mark.medium
def test_overwrite_removes_only_the_files_of_a_run(cache: Path, tmp_path: Path) -> None:
    train_student(tiny_run.recipe(cache, tmp_path / "run", ema_decay=0.5))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    for made_of_it, name in (("evaluation", "confusion.png"), ("export", "model.onnx")):
        (tmp_path / "run" / made_of_it).mkdir()
        (tmp_path / "run" / made_of_it / name).write_text("old")
    train_student(tiny_run.recipe(cache, tmp_path / "run", epochs=1), overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert not any((tmp_path / "run" / gone).exists() for gone in (EMA, "evaluation", "export"))
    assert len(list((tmp_path / "run" / "tb").iterdir())) <= 1


@pytest.mark.medium
def test_overwrite_removes_the_comparison_with_labels(cache: Path, tmp_path: Path) -> None:
    """Otherwise the page would compare with it."""
    train_student(tiny_run.recipe(cache, tmp_path / "run", epochs=1, compare_with_labels=True))
    (tmp_path / "run" / "labels-only" / "notes.txt").write_text("mine")
    result = train_student(tiny_run.recipe(cache, tmp_path / "run", epochs=1), overwrite=True)
    assert result.labels_only is None
    assert {file.name for file in (tmp_path / "run" / "labels-only").iterdir()} == {".lock", "notes.txt"}
    assert "Labels alone" not in (tmp_path / "run" / "report.html").read_text()


def test_a_folder_that_is_no_run_is_refused_and_not_changed(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    for overwrite in (False, True):
        with pytest.raises(RecipeError, match="something else than a run"):
            train_student(tiny_run.recipe(cache, tmp_path / "photos"), overwrite=overwrite)
    with pytest.raises(StorageError, match="a file is where"):
        train_student(tiny_run.recipe(cache, tmp_path / "photos" / "cat.jpg"))


@pytest.mark.medium
def test_only_one_process_may_write_a_run(cache: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="another process"):
            train_student(tiny_run.recipe(cache, tmp_path / "run"))
    assert train_student(tiny_run.recipe(cache, tmp_path / "run", epochs=1)).last is not None


def test_moved_images_give_the_same_run(cache: Path, pictures: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved)
    train_student(tiny_run.recipe(cache, tmp_path / "original"))
    train_student(tiny_run.recipe(cache, tmp_path / "moved-run", data_dir=moved))
    same_runs(tmp_path / "original", tmp_path / "moved-run")


def test_a_run_without_a_test_split(pictures: Path, tmp_path: Path) -> None:
    dataset = tiny_run.dataset(pictures).model_dump() | {"test_split": None}
    result = train_student(tiny_run.recipe(tmp_path, tmp_path / "run", loss={"kind": "ce"}, dataset=dataset))
    assert (result.last, result.best, result.best_epoch) == (None, None, None)
    assert not (tmp_path / "run" / BEST).exists()
    assert (tmp_path / "run" / LAST).exists()
    assert "no test split" in summary(result)


def test_any_source_of_targets_can_be_trained_on(cache: Path, tmp_path: Path) -> None:
    """A source that returns the rows of a cache gives the same student as the cache."""
    recipe = tiny_run.recipe(cache, tmp_path / "cached")
    data = open_data(recipe, CPU)
    train_on(data, recipe, CPU)
    opened = TeacherCache.open(cache)

    class RowsOfCache:
        def __init__(self, view: int = 0) -> None:
            self.number = view

        def view(self, view: int) -> RowsOfCache:
            return RowsOfCache(view)

        def batch(self, index: torch.Tensor, pixels_NCHW_u8: torch.Tensor) -> BatchTargets:
            rows = opened.read_array("fused_logits", self.number)[index.numpy()]
            return BatchTargets(torch.from_numpy(rows.astype(np.float32)), None)

        def close(self) -> None:
            pass

    from dataclasses import replace

    other = tiny_run.recipe(cache, tmp_path / "elsewhere")
    train_on(replace(data, targets=RowsOfCache()), other, CPU)
    same_runs(tmp_path / "cached", tmp_path / "elsewhere")


def expected_errors() -> dict[str, tuple[type[CacheError], str]]:
    return {
        "missing cache": (NotFoundError, "no cache here"),
        "half-built cache": (IncompleteError, "build-cache"),
        "images of another dataset": (MismatchError, "not the one the cache was built from"),
        "missing images": (DataError, "gone"),
        "drifted views": (MismatchError, "pixels that the teachers saw"),
        "unknown student": (RecipeError, "resnet9"),
        "no CUDA": (DeviceError, "CUDA"),
        "float16 on a CPU": (RecipeError, "float16"),
        "images of another size": (RecipeError, "cannot take images of this size .16 × 16 pixels.*--student"),
        "damaged state": (WeightsError, "--overwrite"),
        "damaged result": (WeightsError, "--overwrite"),
    }


@pytest.mark.parametrize("case", expected_errors())
def test_bad_input_is_one_clear_line(cache: Path, pictures: Path, tmp_path: Path, case: str) -> None:
    if case == "no CUDA" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    kind, words = expected_errors()[case]
    with pytest.raises(kind, match=words) as caught:
        train_student(broken_recipe(case, cache, pictures, tmp_path))
    assert "\n" not in str(caught.value)


def broken_recipe(case: str, cache: Path, pictures: Path, tmp_path: Path) -> TrainRecipe:
    """A recipe that must fail, with the files that make it fail."""
    settings: dict[str, dict[str, Any]] = {
        "unknown student": {"student": "resnet9"},
        "no CUDA": {"device": "cuda"},
        "float16 on a CPU": {"precision": "float16"},
        "images of another size": {"student": "timm:vit_tiny_patch16_224"},
        "missing cache": {"cache": tmp_path / "nowhere.zarr"},
        "missing images": {"data_dir": str(tmp_path / "gone")},
    }
    changes = settings.get(case, {})
    if case == "half-built cache":
        changes["cache"] = tiny_run.write_cache(tmp_path / "half.zarr", pictures, blocks=5)
    elif case == "images of another dataset":
        changes["data_dir"] = str(tiny_run.write_pictures(tmp_path / "others", seed=1))
    elif case == "drifted views":
        changes["cache"] = tiny_run.write_cache(tmp_path / "drifted.zarr", pictures, drifted=True)
    elif case.startswith("damaged"):
        train_student(tiny_run.recipe(cache, tmp_path / "run"))
        for name in (run_files.RESULT,) if case == "damaged result" else (run_files.STATE, run_files.RESULT):
            path = tmp_path / "run" / name
            path.write_bytes(path.read_bytes()[:50])
        if case == "damaged state":
            (tmp_path / "run" / run_files.RESULT).unlink()
    return tiny_run.recipe(changes.pop("cache", cache), tmp_path / "run", **changes)


def interrupt(patch: pytest.MonkeyPatch, place: Any, name: str, count: int) -> None:
    """Raise KeyboardInterrupt at the count-th call of a function."""
    original, calls = getattr(place, name), []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    patch.setattr(place, name, wrapper)
