"""A sweep with several test splits: every figure on the terminal, in `--json` and on the page, recomputed."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cache_tools.images import open_images
from tests.support import tiny_run
from train.checkpoints import load_student
from train.report.comparison import compare
from train.report.trials import further_splits, read_table, read_trials, setting_columns
from train.runs.result import load_result
from train.sweep.cli import app
from train.sweep.recipe import SweepRecipe
from train.sweep.run import SweepResult
from train.sweep.table import over_seeds
from train.sweep.text import sweep_text

pytestmark = pytest.mark.medium
T_095 = 12.7062  # Student's t(0.975, 1), from a printed table


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    return tiny_run.write_test_splits(tmp_path_factory.mktemp("pictures"), test=21)


@pytest.fixture(scope="module")
def pictures(written: tuple[Path, list[str]]) -> Path:
    return written[0]


@pytest.fixture(scope="module")
def splits(written: tuple[Path, list[str]]) -> list[str]:
    return written[1]


@pytest.fixture(scope="module")
def sweep(
    pictures: Path, splits: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object]]:
    """The folder of a sweep of two students with two seeds each, and what `--json` printed."""
    folder = tmp_path_factory.mktemp("sweep") / "sweep"
    dataset = f"{{name: folder, data_dir: {pictures}, image_size: {tiny_run.SIDE}, test_split: {json.dumps(splits)}}}"
    settings = ["batch_size=8", "loggers=[]", f"dataset={dataset}", "loss={kind: ce}"]
    items = [part for item in settings for part in ("--set", item)]
    arguments = ["--students", "resnet8,ShuffleV2", "--seeds", "2", "--epochs", "1", "--workers", "1"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(folder), "--json", *items], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return folder, json.loads(done.stdout)


def top1(folder: Path, pictures: Path, split: str) -> float:
    """The top-1 of a trial's last weights, from its forward pass over the split."""
    model, card = load_student(folder / "last.safetensors")
    images = open_images(tiny_run.dataset(pictures), split)
    pixels = torch.from_numpy(images.load(slice(None))).float() / 255
    shape = (1, 3, 1, 1)
    seen = card.preprocessing(images.image_size)
    pixels = (pixels - torch.tensor(seen.mean).reshape(shape)) / torch.tensor(seen.std).reshape(shape)
    with torch.no_grad():
        return float(np.mean(model(pixels).argmax(1).numpy() == images.labels))


@pytest.fixture(scope="module")
def recomputed(
    sweep: tuple[Path, dict[str, object]], pictures: Path, splits: list[str]
) -> dict[tuple[str, str], list[float]]:
    """(student, split) → top-1 by seed."""
    trials = sweep[0] / "trials"
    return {
        (student, split): [top1(trials / f"{student}-s{seed}", pictures, split) for seed in (0, 1)]
        for student in ("resnet8", "ShuffleV2")
        for split in splits
    }


def mean_std_half(values: list[float]) -> tuple[float, float, float]:
    mean = sum(values) / 2
    std = math.sqrt(sum((value - mean) ** 2 for value in values))
    return mean, std, T_095 * std / math.sqrt(2)


def test_json_has_every_split(
    sweep: tuple[Path, dict[str, list[dict[str, object]]]],
    splits: list[str],
    recomputed: dict[tuple[str, str], list[float]],
) -> None:
    for row in sweep[1]["trials"]:
        student, seed = str(row["student"]), int(str(row["seed"]))
        assert row["test_split"] == "test"
        for name, split in zip(["top1", *(f"figure on {split}" for split in splits[1:])], splits, strict=True):
            assert row[name] == pytest.approx(recomputed[student, split][seed])
    for row in sweep[1]["settings"]:
        for split in splits[1:]:
            found = [row[f"{name} on {split}"] for name in ("figure", "std", "ci95")]
            assert found == pytest.approx(mean_std_half(recomputed[str(row["student"]), split]), rel=1e-4)


def test_the_terminal_shows_every_split_in_80_columns(
    sweep: tuple[Path, dict[str, object]],
    splits: list[str],
    recomputed: dict[tuple[str, str], list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    trials = read_table(sweep[0])
    text = sweep_text(SweepResult(sweep[0], trials, over_seeds(trials)), SweepRecipe(name="any", base={}))
    _, _, table = text.partition("top-1 % on the other test splits; all other figures are of test\n")
    head, *lines = table.partition("\n\n")[0].splitlines()
    assert re.fullmatch(r"student +loss +test\[::2\] +\S{10}…\S{13}", head)
    assert splits[2].endswith(head.rpartition("…")[2])
    assert {line.split()[0] for line in lines} == {"resnet8", "ShuffleV2"}
    for line in lines:
        student, _, *figures = line.split()
        expected = [mean_std_half(recomputed[student, split])[:2] for split in splits[1:]]
        assert figures == [word for mean, std in expected for word in (f"{100 * mean:.2f}", "±", f"{100 * std:.2f}")]
    assert max(map(len, [head, *lines])) <= 80


def test_the_page_shows_every_split(
    sweep: tuple[Path, dict[str, object]], splits: list[str], recomputed: dict[tuple[str, str], list[float]]
) -> None:
    page = (sweep[0] / "report.html").read_text()
    assert page.count('data-key="figure on ') == 2
    for (_, split), values in recomputed.items():
        mean, std, _ = mean_std_half(values)
        shown = re.findall(r'data-value="([\d.e-]+)">([\d.]+)<span class="deviation">±&#8239;([\d.]+)</span>', page)
        assert any(
            float(value) == pytest.approx(mean) and (text, deviation) == (f"{100 * mean:.2f}", f"{100 * std:.2f}")
            for value, text, deviation in shown
        ), split


def test_a_table_without_its_runs_keeps_the_figures(
    sweep: tuple[Path, dict[str, object]], splits: list[str], tmp_path: Path
) -> None:
    (tmp_path / "moved").mkdir()
    shutil.copy(sweep[0] / "trials.parquet", tmp_path / "moved")
    table = read_table(tmp_path / "moved")
    assert further_splits(table) == splits[1:]
    assert setting_columns(table) == ["student", "loss"]
    for setting in compare(read_trials([], table)).settings:
        assert {f"figure on {split}" for split in splits[1:]} <= setting.figures.keys()
    (row, *_) = table.to_dicts()
    result = load_result(sweep[0] / "trials" / Path(row["folder"]).name)
    assert result is not None
    assert [row[f"figure on {split}"] for split in splits[1:]] == [
        more.last and more.last.headline for more in result.more_tests.values()
    ]
