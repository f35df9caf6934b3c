"""A run whose test split lacks a class: the figures are right, and a note says what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_tools.errors import DataError
from cache_tools.images import open_images
from pipeline.evaluate.evaluator import evaluate_student
from pipeline.evaluate.report import EvaluateOptions
from pipeline.evaluate.text import print_report
from tests.support import tiny_run
from train.checkpoints import load_student
from train.run import train_student
from train.runs.result import RunResult, summary

pytestmark = pytest.mark.medium

NOTE = "no test images of: blue"  # the first class, so that all labels of the test split shift


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Trained on labels with the classes blue, green, red; the test split has green and red."""
    root = tmp_path_factory.mktemp("sets")
    pictures = tiny_run.write_pictures(root / "pictures", train=96, test=30)
    shutil.copytree(pictures / "test", pictures / "other")
    (pictures / "other" / "red").rename(pictures / "other" / "koala")
    shutil.rmtree(pictures / "test" / "blue")
    dataset = tiny_run.dataset(pictures)
    loss = {"kind": "ce"}
    return train_student(tiny_run.recipe("x", root / "run", dataset=dataset.model_dump(), loss=loss))


def recomputed(run: RunResult) -> float:
    """Top-1 by the names of the folders, from the stored weights."""
    model, card = load_student(run.folder / "last.safetensors", torch.device("cpu"))
    images = open_images(tiny_run.dataset(run.folder.parent / "pictures"), "test")
    pixels = torch.from_numpy(np.ascontiguousarray(images.load(slice(None)))).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (card.mean, card.std))
    answers = model.eval()((pixels - mean) / std).argmax(1).tolist()
    right = [
        card.class_names[answer] == images.class_names[label]
        for answer, label in zip(answers, images.labels, strict=True)
    ]
    return sum(right) / len(right)


def test_training_counts_by_name_and_says_what_is_missing(run: RunResult) -> None:
    assert run.last is not None
    assert run.last.n == 20
    assert run.last.top1 == pytest.approx(recomputed(run))
    assert run.notes == (NOTE,)
    assert f"Note: {NOTE}." in summary(run)
    assert json.loads((run.folder / "result.json").read_text())["notes"] == [NOTE]


def test_evaluation_has_no_figures_of_the_missing_class(run: RunResult, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate_student(run.folder, EvaluateOptions(device="cpu"))
    assert report.chosen.evaluation.top1 == pytest.approx(recomputed(run))
    assert report.notes == (NOTE,)
    assert [(row.name, row.n, row.accuracy is None) for row in report.classes] == [
        ("blue", 0, True),
        ("green", 10, False),
        ("red", 10, False),
    ]
    text = (run.folder / "evaluation" / "evaluation.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["notes"] == [NOTE]
    print_report(report)
    printed = capsys.readouterr().out
    assert f"Note: {NOTE}." in printed
    assert "nan" not in printed


def test_every_command_refuses_an_unknown_class_with_the_same_words(run: RunResult, tmp_path: Path) -> None:
    words = r"the test split has classes that training does not know \(folder, split other\).*found koala"
    with pytest.raises(DataError, match=words):
        evaluate_student(run.folder, EvaluateOptions(device="cpu", split="other"))
    dataset = tiny_run.dataset(run.folder.parent / "pictures").model_copy(update={"test_split": "other"})
    with pytest.raises(DataError, match=words):
        train_student(tiny_run.recipe("x", tmp_path, dataset=dataset.model_dump(), loss={"kind": "ce"}, epochs=1))


def test_another_split_has_its_own_note(run: RunResult) -> None:
    report = evaluate_student(run.folder, EvaluateOptions(device="cpu", split="train"))
    assert report.notes == ()
