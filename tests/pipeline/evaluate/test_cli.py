"""The `evaluate-student` command: its tables, files and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from cache_tools.format.recipe import Preprocessing
from cache_tools.images import open_images
from pipeline.build.cache import build_cache
from pipeline.evaluate.cli import app
from tests.support import corrupted_folder, tiny_build, tiny_run
from train.checkpoints import load_student
from train.evaluate.confusion import plot_confusion
from train.evaluate.corruptions import CORRUPTIONS, open_corrupted
from train.evaluate.metrics import evaluate
from train.evaluate.robustness import robustness
from train.evaluate.robustness_plot import plot_robustness
from train.run import train_student

pytestmark = pytest.mark.medium

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
FILES = {"evaluation.json", "confusion.parquet", "confusion.png"}
PICTURES = {"robustness.parquet", "robustness.png"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A cache of three tinted classes, a run with an EMA and its twin, and corrupted copies of the test images."""
    root = tiny_build.prepare(tmp_path_factory.mktemp("evaluate"), train=48)
    build_cache(tiny_build.recipe(root, num_views=1))
    train_student(tiny_run.recipe(root / "cache.zarr", root / "run", epochs=2, ema_decay=0.5, compare_with_labels=True))
    labels = open_images(tiny_run.dataset(root / "pictures"), "test").labels
    corrupted_folder.write(root / "corrupted", labels, tiny_run.SIDE)
    return root


@pytest.fixture
def real_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations of this test draw their plots."""
    monkeypatch.setattr("train.evaluate.confusion.plot_confusion", plot_confusion)
    monkeypatch.setattr("train.evaluate.robustness_plot.plot_robustness", plot_robustness)


@pytest.fixture
def run(root: Path, tmp_path) -> Path:
    return Path(shutil.copytree(root / "run", tmp_path / "run"))


def test_a_plain_evaluation(run: Path, root: Path):
    done = invoke(run)
    assert done.exit_code == 0, done.stderr
    for words in ("last (epoch 2) ←", "best (epoch", "ema (epoch 2)", "baseline, last (epoch 2)", "Brier", "green"):
        assert words in done.stdout
    assert {path.name for path in (run / "evaluation").iterdir()} == FILES
    report = json.loads((run / "evaluation" / "evaluation.json").read_text())
    images = open_images(tiny_run.dataset(root / "pictures"), "test")
    for row in report["figures"]:
        model, card = load_student(run / f"{row['checkpoint']}.safetensors")
        expected = evaluate(model, images, Preprocessing(mean=card.mean, std=card.std), CPU).model_dump()
        assert row["evaluation"] == pytest.approx(expected, abs=1e-6)
    counts = pl.read_parquet(run / "evaluation" / "confusion.parquet")
    assert counts["count"].sum() == len(images)
    right = counts.filter(pl.col("label") == pl.col("predicted"))["count"].sum()
    assert right / len(images) == pytest.approx(report["figures"][0]["evaluation"]["top1"])
    assert [row["n"] for row in report["classes"]] == np.bincount(images.labels).tolist()


@pytest.mark.usefixtures("real_plots")
def test_robustness_relative_to_the_twin_of_the_run(run: Path, root: Path):
    done = invoke(run, "--corruptions", root / "corrupted", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert {path.name for path in (run / "evaluation").iterdir()} == FILES | PICTURES
    assert all((run / "evaluation" / f"{name}.png").stat().st_size > 10_000 for name in ("confusion", "robustness"))
    table = pl.read_parquet(run / "evaluation" / "robustness.parquet")
    images = open_images(tiny_run.dataset(root / "pictures"), "test")
    corrupted = open_corrupted(root / "corrupted", images.labels)
    for who, folder in (("student", run), ("baseline", run / "labels-only")):
        model, card = load_student(folder)
        alone = robustness(model, corrupted, Preprocessing(mean=card.mean, std=card.std), CPU)
        stored = table.filter(pl.col("student") == who)["error"].to_list()
        assert stored == pytest.approx(alone["error"].to_list(), abs=1e-6)
    sums = {
        (row["student"], row["corruption"]): row["error"]
        for row in table.group_by("student", "corruption").agg(pl.col("error").sum()).to_dicts()
    }
    ratios = [sums["student", name] / sums["baseline", name] for name in CORRUPTIONS]
    assert report["robustness"]["summary"]["mce"] == pytest.approx(np.mean(ratios))
    assert report["robustness"]["baseline"] == str(run / "labels-only")
    clean = report["figures"][0]["evaluation"]["top1"]
    assert report["robustness"]["summary"]["clean_error"] == pytest.approx(1 - clean)


def test_another_baseline_fewer_images_and_another_checkpoint(run: Path, root: Path, tmp_path):
    arguments = ("--corruptions", root / "corrupted", "--robustness-samples", 6, "--out", tmp_path / "here")
    itself = invoke(run / "best.safetensors", *arguments, "--baseline", run, "--json")
    assert itself.exit_code == 0, itself.stderr
    report = json.loads(itself.stdout)
    assert report["checkpoint"] == report["baseline_figures"]["checkpoint"] == "best"
    assert report["robustness"]["samples"] == 6
    assert report["robustness"]["summary"]["mce"] == pytest.approx(1.0)
    assert not (run / "evaluation").exists()
    assert {path.name for path in (tmp_path / "here").iterdir()} == FILES | PICTURES


def test_without_a_baseline_errors_are_not_normalised(run: Path, root: Path):
    done = invoke(run / "labels-only", "--corruptions", root / "corrupted")
    assert done.exit_code == 0, done.stderr
    assert "mean errors are not normalised" in done.stdout
    assert "relative CE" not in done.stdout


def test_teachers_and_shifted_images(run: Path, root: Path, tmp_path):
    shifted = shutil.copytree(root / "pictures" / "test", tmp_path / "shifted")
    (shifted / "red").rename(shifted / "RED")
    done = invoke(run, "--teachers", "--shifted", shifted, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["source"] for row in report["teachers"]] == ["teacher", "CLIP", "fusion"]
    last = report["figures"][0]["evaluation"]
    assert report["shifted"] == pytest.approx(last, abs=1e-6), "the test images themselves, in other folders"
    table = invoke(run, "--teachers", "--shifted", shifted)
    for words in ("Agreement with the teachers", "student follows", "shifted images, last"):
        assert words in table.stdout


def test_the_folder_is_about_the_last_evaluation(run: Path, root: Path):
    assert invoke(run, "--corruptions", root / "corrupted").exit_code == 0
    assert invoke(run, "--checkpoint", "ema", "--split", "train").exit_code == 0
    assert {path.name for path in (run / "evaluation").iterdir()} == FILES
    report = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert (report["checkpoint"], report["split"], report["robustness"]) == ("ema", "train", None)
    assert report["figures"][0]["evaluation"]["n"] == 48


def test_a_run_with_an_evaluation_can_be_resumed_and_overwritten(run: Path, root: Path):
    assert invoke(run).exit_code == 0
    recipe = tiny_run.recipe(root / "cache.zarr", run, epochs=2, ema_decay=0.5)
    before = json.loads((run / "evaluation" / "evaluation.json").read_text())["figures"][0]["evaluation"]["top1"]
    again = train_student(recipe)
    assert again.last is not None
    assert again.last.top1 == pytest.approx(before)
    assert again.last.brier is not None
    train_student(recipe, overwrite=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "first"], "'last', 'best' or 'ema'"),
        (["--precision", "float8"], "precision"),
        (["--robustness-samples", "0"], "robustness_samples"),
        (["--batch-size", "0"], "batch_size"),
        (["--split", "validation"], "image folder not found"),
        (["--corruptions", "/nowhere"], "layout of CIFAR-10-C"),
        (["--baseline", "/nowhere"], "no run of train-student"),
        (["--shifted", "/nowhere"], "no such folder"),
        (["--data-dir", "/nowhere"], "image folder not found"),
        (["--robustness"], "too small for the corruptions"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(run: Path, arguments: list[str], words: str):
    failed = invoke(run, *arguments)
    assert failed.exit_code == 2
    assert failed.stderr.startswith("error: ")
    assert words in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1
    assert failed.stdout == ""


def test_other_errors(run: Path, tmp_path):
    nothing = invoke(tmp_path / "nothing")
    assert nothing.exit_code == 2
    assert "no run of train-student here" in nothing.stderr
    (tmp_path / "file").write_text("")
    blocked = invoke(run, "--out", tmp_path / "file")
    assert blocked.exit_code == 2
    assert "a file is where the evaluation should be" in blocked.stderr
    alone = invoke(run / "labels-only", "--teachers")
    assert alone.exit_code == 2
    assert "no teachers" in alone.stderr
    (run / "last.safetensors").write_bytes(b"x" * 100)
    damaged = invoke(run)
    assert damaged.exit_code == 2
    assert "damaged checkpoint" in damaged.stderr


def invoke(*arguments: object):
    device = () if "--device" in arguments else ("--device", "cpu")
    return CliRunner().invoke(app, [str(argument) for argument in (*arguments, *device)], env={"COLUMNS": "200"})
