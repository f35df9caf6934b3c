"""A bad value of an option: the error names the option as it was typed, in every command."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

APPS = {
    "build-cache": "pipeline.cli",
    "train-student": "train.cli",
    "sweep-students": "train.sweep.cli",
    "evaluate-student": "pipeline.evaluate.cli",
    "export-student": "train.export.cli",
    "cache-tools": "cache_tools.cli",
}
BUILD = ["--views", "--seed", "--teacher-weight", "--batch-size", "--store", "--codec", "--precision"]
TRAIN = [
    "--epochs", "--batch-size", "--accumulate", "--lr", "--clip-grad-norm", "--label-smoothing", "--class-weights",
    "--views", "--teacher-weight", "--clip-scale", "--label-fraction", "--checkpoint-every-minutes", "--precision",
    "--seed", "--log", "--device-memory", "--host-memory", "--pixel-disk", "--shuffle-window", "--stage-budget",
    "--compile",
]  # fmt: skip
SWEEP = [
    "--epochs",
    "--seeds",
    "--name",
    "--checkpoint-every-minutes",
    "--pixel-disk",
    "--shuffle-window",
    "--compile",
    "--stage-budget",
]
EVALUATE = ["--batch-size", "--robustness-samples", "--workers", "--precision", "--checkpoint"]
EXPORT = ["--samples", "--tolerance", "--format", "--weights", "--input", "--batch-size"]
CASES = [
    *(("build-cache", [], option) for option in BUILD),
    *(("train-student", [], option) for option in TRAIN),
    *(("sweep-students", [], option) for option in SWEEP),
    *(("evaluate-student", ["run"], option) for option in EVALUATE),
    *(("export-student", ["run"], option) for option in EXPORT),
    *(("cache-tools", [name, "cache"], "--teacher-weight") for name in ("stats", "fuse")),
    *(("cache-tools", [name, "cache"], "--clip-scale") for name in ("stats", "fuse")),
    ("cache-tools", ["fuse", "cache"], "--prompt-ensemble"),
]


def failure(command: str, arguments: list[str]) -> str:
    app: Any = import_module(APPS[command]).app
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 2, done.output
    return " ".join(done.stderr.split())


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("command", "before", "option"), CASES)
def test_an_error_names_the_option(command: str, before: list[str], option: str) -> None:
    error = failure(command, [*before, option, "-7"])
    assert option in error
    assert "--set" not in error


def test_set_is_named_with_its_item() -> None:
    assert "(--set lr=-7)" in failure("train-student", ["--set", "lr=-7", "--epochs", "3"])
    assert "(--set views.base_seed=x)" in failure("build-cache", ["--set", "views.base_seed=x", "--seed", "3"])


def test_a_setting_without_effect_names_the_option() -> None:
    error = failure("train-student", ["--loss", "ce", "--teacher-weight", "0.5"])
    assert "this setting has no effect (--teacher-weight 0.5)" in error
    error = failure("train-student", ["--loss", "ce", "--set", "temperature=3.5"])
    assert "this setting has no effect (--set temperature=3.5)" in error


def test_a_sweep_names_the_file_or_the_trial(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("set: {epochs: -1, batch_size: 0}\n")
    assert "bad value for 'epochs' (sweep.yaml, set.epochs)" in failure(
        "sweep-students", ["--sweep", "sweep.yaml", "--set", "batch_size=8"]
    )
    assert "(--set batch_size=0)" in failure(
        "sweep-students", ["--sweep", "sweep.yaml", "--epochs", "3", "--set", "batch_size=0"]
    )
    assert "bad value for 'optimiser.learning_rate' (sweep digits, lr=-1)" in failure(
        "sweep-students", ["--grid", "lr=0.1,-1"]
    )


def test_a_folder_for_a_source_without_files_names_the_option(tmp_path: Path) -> None:
    for command in ("build-cache", "train-student"):
        error = failure(command, ["--data-dir", "photos", *(["--loss", "ce"] if command == "train-student" else [])])
        assert "the dataset digits has no folder of files, so --data-dir is not for it" in error


@pytest.mark.parametrize("classes", [(), ("only",)])
def test_a_folder_of_the_wrong_kind_names_the_option(tmp_path: Path, classes: tuple[str, ...]) -> None:
    from PIL import Image

    for name in classes:
        folder = tmp_path / "photos" / "train" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "a.png")
    (tmp_path / "photos" / "train").mkdir(parents=True, exist_ok=True)
    error = failure("train-student", ["photos", "--loss", "ce", "--epochs", "1"])
    assert re.search(r"\(as the argument or --data-dir\),? or dataset\.split", error)
