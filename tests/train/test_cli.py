"""The command `train-student`: its output, its errors, its start-up, and the imports it must avoid."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from cache_tools.home import registry
from tests.support import tiny_run
from train.cli import app
from train.run import train as run

pytestmark = pytest.mark.medium

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> str:
    """A recipe file with a cache and a dataset."""
    folder = tmp_path_factory.mktemp("recipe")
    data = {
        "name": "tiny",
        "cache": str(tiny_run.write_cache(folder / "tiny.zarr", pictures)),
        "dataset": tiny_run.dataset(pictures).model_dump(mode="json"),
        "student": "resnet8",
        "optimiser": {"learning_rate": 0.05},
        "epochs": 2,
        "batch_size": 16,
        "device": "cpu",
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    return str(folder / "tiny.yaml")


def test_a_run_prints_a_table_and_json(recipe_file: str, tmp_path: Path) -> None:
    arguments = [recipe_file, "--out", str(tmp_path / "run"), "--compare-with-labels"]
    first = invoke(*arguments)
    assert first.exit_code == 0, first.stderr
    for words in ("top-1", "teacher", "resnet8 distilled", "resnet8 on labels alone", str(tmp_path / "run")):
        assert words in first.stdout
    second = invoke(*arguments, "--json")
    result = json.loads(second.stdout)
    assert result["labels_only"]["loss"] == "ce"
    assert 0 <= result["last"]["top1"] <= 1


def test_labels_alone_need_no_cache(recipe_file: str, tmp_path: Path) -> None:
    done = invoke(
        recipe_file, "--loss", "ce", "--student", "resnet14", "--set", "cache=null", "--out", str(tmp_path / "r")
    )
    assert done.exit_code == 0, done.stderr
    assert "resnet14 on labels" in done.stdout
    assert not (tmp_path / "r" / "cache.json").exists()


def test_show_recipe_prints_the_whole_recipe_with_options_and_overrides() -> None:
    shown = invoke(
        "digits", "--loss", "richkd", "--epochs", "7", "--lr", "0.3", "--batch-size", "32", "--seed", "5",
        "--student", "wrn_16_1", "--cache", "abc", "--device", "cpu", "--out", "o", "--data-dir", "d", "--download",
        "--precision", "bfloat16", "--no-compare-with-labels", "--set", "epochs=9", "--set", "loss.temperature=2",
        "--show-recipe",
    )  # fmt: skip
    recipe = yaml.safe_load(shown.stdout)
    assert recipe["epochs"] == 9, "--set wins"
    assert recipe["loss"] | {"kind": "kd", "feature": "crd", "temperature": 2.0} == recipe["loss"]
    assert recipe["optimiser"]["learning_rate"] == 0.3
    expected = {
        "batch_size": 32, "seed": 5, "student": "wrn_16_1", "cache": "abc", "device": "cpu", "out": "o",
        "data_dir": "d", "download": True, "precision": "bfloat16", "compare_with_labels": False,
    }  # fmt: skip
    assert recipe | expected == recipe


@pytest.fixture
def photos(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a cache in the cache home; the current folder is empty."""
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    tiny_run.write_cache(tmp_path / "home" / "photos-000000000000.zarr", pictures, name="photos")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return "photos"


FAST = ("--student", "resnet8", "--epochs", "1", "--batch-size", "16", "--device", "cpu", "--log", "none")


def test_a_run_from_a_cache_is_named_after_the_cache(photos: str, pictures: Path) -> None:
    done = invoke("--cache", photos, *FAST)
    assert done.exit_code == 0, done.stderr
    (run_folder,) = Path("runs").iterdir()
    assert run_folder.name.startswith("photos-resnet8-kd-")
    page = (run_folder / "report.html").read_text()
    assert "<title>resnet8 on photos</title>" in page
    assert "21 test images of photos" in page
    again = invoke("digits", "--cache", photos, *FAST, "--out", "named")
    assert again.exit_code == 0, again.stderr
    assert "<title>resnet8 on photos</title>" in Path("named/report.html").read_text(), "whatever the recipe is called"


def test_curves_are_titled_after_the_cache(photos: str, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []
    monkeypatch.setattr("train.run.state.plot_curves", lambda history, path, title, references: titles.append(title))
    invoke("--cache", photos, *FAST, "--compare-with-labels")
    assert titles[-1] == "resnet8 on photos, loss kd, seed 0"


def test_names_of_runs(photos: str) -> None:
    def name(*arguments: str) -> str:
        return yaml.safe_load(invoke(*arguments, "--show-recipe").stdout)["name"]

    assert name("--cache", photos) == "photos"
    assert name("--cache", str(registry.resolve(photos))) == "photos"
    assert name("digits", "--cache", photos) == "digits"
    assert name("fashion-mnist", "--cache", photos) == "fashion-mnist"
    assert name("--cache", photos, "--set", "name=mine") == "mine"
    assert name("--cache", "nowhere") == "digits"
    assert name("--cache", photos, "--loss", "ce") == "photos", "labels alone, with the images of the cache"
    assert name() == "digits"


def test_a_run_that_an_earlier_version_named_after_the_recipe_is_continued(photos: str) -> None:
    invoke("digits", "--cache", photos, *FAST)
    (earlier,) = Path("runs").iterdir()
    done = invoke("--cache", photos, *FAST)
    assert f"Everything is in {earlier}" in done.stdout
    assert list(Path("runs").iterdir()) == [earlier]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "epochz=1"], "Did you mean 'epochs'"),
        (["--set", "loss.temprature=1"], "Did you mean 'temperature'"),
        (["--loss", "kdd"], "no such loss"),
        (["fashion"], "fashion-mnist"),
        (["nothing.yaml"], "nothing.yaml"),
        (["--cache", "/nowhere/x.zarr"], "no cache here"),
        (["--precision", "float8"], "precision"),
        (["--loss", "kd", "--set", "cache=null"], "none is named"),
        (["--epochs", "0"], "epochs"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments: list[str], words: str) -> None:
    failed = invoke(*arguments)
    assert failed.exit_code == 2
    assert words in failed.stderr
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.strip().splitlines()) == 1
    assert failed.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_a_gpu_is_an_error(recipe_file: str) -> None:
    failed = invoke(recipe_file, "--device", "cuda")
    assert failed.exit_code == 2
    assert "CUDA" in failed.stderr


def test_a_folder_that_cannot_be_written_is_an_error(recipe_file: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    failed = invoke(recipe_file, "--out", str(tmp_path / "file" / "run"))
    assert failed.exit_code == 2
    assert "cannot write" in failed.stderr


def test_a_full_disk_is_an_error_and_the_run_resumes(
    monkeypatch: pytest.MonkeyPatch, recipe_file: str, tmp_path: Path
) -> None:
    def full(path: Path, data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("train.checkpoints.write_file", full)
    failed = invoke(recipe_file, "--out", str(tmp_path / "run"))
    assert failed.exit_code == 2
    assert "No space left" in failed.stderr.splitlines()[-1]
    monkeypatch.undo()
    assert invoke(recipe_file, "--out", str(tmp_path / "run")).exit_code == 0


def test_ctrl_c_says_how_to_resume(monkeypatch: pytest.MonkeyPatch, recipe_file: str, tmp_path: Path) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_note", stop)
    interrupted = invoke(recipe_file, "--out", str(tmp_path / "run"))
    assert interrupted.exit_code == 130
    assert "same command" in interrupted.stderr


WITNESS = """
import sys
from train.cli import main
try:
    main()
except SystemExit as left:
    assert not left.code, left.code
slow = {"scipy", "sklearn", "timm", "torchmetrics", "torchvision"}
loaded = sorted({name.partition(".")[0] for name in sys.modules} & {"pipeline", "open_clip", "torch", *slow})
print("LOADED", *loaded)
"""


def test_a_full_run_never_imports_a_teacher(recipe_file: str, tmp_path: Path) -> None:
    """Training on cached targets, with a feature term and the comparison, imports nothing that can run a teacher.

    Nor what makes its start slow and such a run does not need.
    """
    arguments = [
        recipe_file,
        "--loss",
        "richkd",
        "--compare-with-labels",
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITNESS, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "LOADED torch"
    assert (tmp_path / "run" / "labels-only" / "result.json").exists()


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))
