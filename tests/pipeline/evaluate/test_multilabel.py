"""`evaluate-student` on images with any number of labels: every figure recomputed from logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_score, recall_score
from typer.testing import CliRunner

from cache_tools.images import open_images
from cache_tools.preprocess import prepare
from pipeline.build.cache import build_cache
from pipeline.evaluate.cli import app
from pipeline.evaluate.report import EvaluationReport
from tests.support import multilabel, tiny_run
from train.checkpoints import load_student
from train.recipe.loss import named_loss
from train.run import train_student

pytestmark = pytest.mark.medium
Array = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return multilabel.prepare(tmp_path_factory.mktemp("multilabel"))


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    cache = build_cache(multilabel.build_recipe(root, root / "cache.zarr", num_views=1)).path
    dataset = {"test_split": ["test", "test[::2]"]}
    settings = {"loss": named_loss("bce"), "epochs": 3, "ema_decay": 0.5, "dataset": dataset}
    return train_student(tiny_run.recipe(cache, root / "run", **settings)).folder


@pytest.fixture(scope="module")
def printed(run: Path) -> str:
    arguments = [str(run), "--teachers", "--device", "cpu"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def report(run: Path, printed: str) -> EvaluationReport:
    return EvaluationReport.model_validate_json((run / "evaluation" / "evaluation.json").read_text())


def logits_and_labels(root: Path, file: Path, split: str) -> tuple[Array, npt.NDArray[np.uint8]]:
    images = open_images(multilabel.dataset(root / "squares"), split)
    network, card = load_student(file)
    with torch.inference_mode():
        logits = network(prepare(torch.from_numpy(images.load(slice(None))), card.preprocessing(images.image_size)))
    return logits.double().numpy(), images.labels


def sigmoid(logits: Array) -> Array:
    return 1 / (1 + np.exp(-logits))


def test_every_checkpoint_on_every_split(root: Path, run: Path, printed: str) -> None:
    found = report(run, printed)
    by_split = {"test": found.figures, **found.more_splits}
    assert [[row.checkpoint for row in rows] for rows in by_split.values()] == [["last", "best", "ema"]] * 2
    for split, rows in by_split.items():
        for row in rows:
            logits, labels = logits_and_labels(root, run / f"{row.checkpoint}.safetensors", split)
            p = sigmoid(logits)
            bce = -np.mean(np.where(labels == 1, np.log(p), np.log(1 - p)))
            assert row.evaluation.model_dump() == pytest.approx(
                {"n": len(labels), "map": average_precision_score(labels, logits, average="macro"), "bce": bce},
                rel=1e-5,
            )


def test_figures_of_every_label(root: Path, run: Path, printed: str) -> None:
    found = report(run, printed)
    assert (found.classes, found.confused) == ((), ())
    logits, labels = logits_and_labels(root, run / "last.safetensors", "test")
    given = sigmoid(logits) >= 0.5
    for place, row in enumerate(found.labels):
        assert (row.name, row.n) == (multilabel.CLASSES[place], labels[:, place].sum())
        own = labels[:, place], given[:, place]
        assert row.average_precision == pytest.approx(average_precision_score(own[0], logits[:, place]), abs=1e-6)
        assert row.recall == pytest.approx(recall_score(*own))
        assert row.precision == (pytest.approx(precision_score(*own)) if given[:, place].any() else None)
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{row.name} ")]
        shown = [f"{100 * value:.1f}%" if value is not None else "–" for value in
                 (row.average_precision, row.precision, row.recall)]  # fmt: skip
        assert line.split() == [row.name, str(row.n), *shown]


def test_agreement_with_the_teacher(root: Path, run: Path, printed: str) -> None:
    (row,) = report(run, printed).teachers or ()
    student, labels = logits_and_labels(root, run / "last.safetensors", "test")
    teacher, _ = logits_and_labels(root, root / "teacher.safetensors", "test")
    p, q = sigmoid(teacher), sigmoid(student)
    own, other = q >= 0.5, p >= 0.5
    wrong = other != labels
    expected = {
        "n": 40,
        "map": average_precision_score(labels, teacher, average="macro"),
        "agreement": np.mean(own == other),
        "kl": np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))),
        "wrong": np.mean(wrong),
        "right_when_wrong": np.mean((own == labels)[wrong]),
    }
    assert row.source == "teacher"
    assert row.model_dump(exclude={"source"}) == pytest.approx(expected, rel=1e-4)
    assert f"{100 * np.mean(own == other):.2f}%" in printed


def test_the_screen_and_the_files(run: Path, printed: str) -> None:
    tables = printed.partition("AP: average precision")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert "top-1" not in printed
    assert {path.name for path in (run / "evaluation").iterdir()} == {"evaluation.json"}
    stored = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert set(stored["figures"][0]["evaluation"]) == {"n", "map", "bce"}


@pytest.mark.parametrize("option", [["--robustness"], ["--robustness-samples", "5"], ["--shifted", "."]])
def test_parts_for_one_label_are_refused(run: Path, option: list[str]) -> None:
    done = CliRunner().invoke(app, [str(run), *option, "--device", "cpu"])
    assert done.exit_code == 2
    assert f"{option[0]} is for images with one label each" in " ".join(done.stderr.split())
