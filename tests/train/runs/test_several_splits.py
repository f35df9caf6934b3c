"""A run with several test splits: figures on each, in the metrics, the result, the table and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_tools.images import open_images
from cache_tools.images.recipe import DatasetRecipe
from pipeline.evaluate.evaluator import evaluate_student
from pipeline.evaluate.report import EvaluateOptions
from pipeline.evaluate.text import print_report
from tests.support import tiny_run
from train.checkpoints import load_student
from train.evaluate.metrics import evaluate
from train.run import train_student
from train.runs.metrics import read_metrics
from train.runs.result import RunResult, load_result, summary

CPU = torch.device("cpu")
pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    return tiny_run.write_test_splits(tmp_path_factory.mktemp("pictures"), test=9)


@pytest.fixture(scope="module")
def pictures(written: tuple[Path, list[str]]) -> Path:
    return written[0]


@pytest.fixture(scope="module")
def splits(written: tuple[Path, list[str]]) -> list[str]:
    return written[1]


@pytest.fixture(scope="module")
def result(pictures: Path, splits: list[str], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    settings: dict[str, Any] = {
        "loss": {"kind": "ce"},
        "dataset": tiny_run.dataset(pictures).model_copy(update={"test_split": tuple(splits)}),
        "epochs": 2,
        "ema_decay": 0.5,
        "loggers": (),
    }
    return train_student(tiny_run.recipe("", tmp_path_factory.mktemp("run") / "run", **settings))


def expected_top1(result: RunResult, pictures: Path, split: str, which: str) -> float:
    model, card = load_student(result.folder / f"{which}.safetensors")
    images = open_images(tiny_run.dataset(pictures), split)
    return evaluate(model, images, card.preprocessing(images.image_size), CPU).top1


def test_every_split_has_figures_of_each_kind_of_weights(result: RunResult, pictures: Path, splits: list[str]) -> None:
    assert result.last is not None
    assert (result.test_split, result.last.n) == ("test", 9)
    assert list(result.more_tests) == splits[1:]
    assert [figures.last and figures.last.n for figures in result.more_tests.values()] == [5, 12]
    for split, figures in result.more_tests.items():
        for which in ("last", "best", "ema"):
            evaluation = getattr(figures, which)
            assert evaluation.top1 == pytest.approx(expected_top1(result, pictures, split, which))
    assert load_result(result.folder) == result


def test_metrics_have_numbered_columns(result: RunResult, splits: list[str]) -> None:
    history = read_metrics(result.folder)
    assert history is not None
    last = history.row(-1, named=True)
    for number, split in enumerate(splits[1:], 2):
        figures = result.more_tests[split]
        assert figures.last is not None and figures.ema is not None  # noqa: PT018
        assert (last[f"test_{number}_top1"], last[f"ema_{number}_top1"]) == (figures.last.top1, figures.ema.top1)


def test_table_and_page_show_every_split(result: RunResult, splits: list[str]) -> None:
    text = summary(result)
    figures = result.more_tests["test[::2]"]
    assert figures.last is not None
    (line,) = [line for line in text.splitlines() if line.startswith("  its last on test[::2] ")]
    assert line.split()[4] == f"{figures.last.top1:.2%}"
    assert max(map(len, text.split("\n\n")[0].splitlines())) <= 80
    assert f"{splits[2][-12:]} " in text
    page = (result.folder / "report.html").read_text()
    assert page.count('data-key="figure on ') == 2
    assert f'data-value="{figures.last.top1!r}"' in page


def test_evaluate_student_reports_every_split(
    result: RunResult, pictures: Path, splits: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate_student(result.folder, EvaluateOptions(device="cpu", out=tmp_path / "evaluation"))
    assert (report.split, list(report.more_splits)) == ("test", splits[1:])
    for split, rows in report.more_splits.items():
        for row in rows:
            assert row.evaluation.top1 == pytest.approx(expected_top1(result, pictures, split, row.checkpoint))
    print_report(report)
    assert "last (epoch 2), test[::2]" in capsys.readouterr().out
    stored = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert list(stored["more_splits"]) == splits[1:]
    one = evaluate_student(result.folder, EvaluateOptions(device="cpu", split="test[::2]", out=tmp_path / "one"))
    assert (one.split, one.more_splits) == ("test[::2]", {})


def test_a_split_may_be_named_once_only() -> None:
    assert DatasetRecipe(name="digits", test_split=("test",)).test_split == "test"
    with pytest.raises(ValueError, match="named twice"):
        DatasetRecipe(name="digits", test_split=("test", "test"))
    assert DatasetRecipe(name="digits").model_dump(mode="json")["test_split"] == "test"
