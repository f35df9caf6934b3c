"""A student that is asked about views: its logits are those of the stored network on normalised pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cache_tools.errors import DivergedError, MismatchError, WeightsError
from tests.support.tiny_run import CLASSES, SIDE, recipe, write_cache, write_pictures
from train.checkpoints import BEST, load_student, save_student
from train.run import train_student
from train.runs.student import open_student

pytestmark = pytest.mark.medium

CPU = torch.device("cpu")
PIXELS = torch.randint(0, 256, (70, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("student")
    cache = write_cache(root / "c.zarr", write_pictures(root / "pictures", train=32, test=6))
    train_student(recipe(cache, root / "run", epochs=2, loggers=()))
    return root / "run"


def test_logits_are_those_of_the_network(run: Path) -> None:
    student = open_student(str(run), CLASSES, (SIDE, SIDE), CPU)
    model, card = load_student(run)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (card.mean, card.std))
    with torch.inference_mode():
        expected = model((PIXELS / 255 - mean) / std)
    torch.testing.assert_close(student.logits(PIXELS), expected, rtol=1e-4, atol=1e-4)
    assert student.name == "resnet8, 2 epochs"
    assert student.run == str(run)


def test_fingerprint_is_that_of_the_cache(run: Path, tmp_path: Path) -> None:
    student = open_student(str(run), CLASSES, (SIDE, SIDE), CPU)
    assert student.fingerprint is not None
    assert len(student.fingerprint) == 64
    assert open_student(str(run / BEST), CLASSES, (SIDE, SIDE), CPU).fingerprint == student.fingerprint
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / BEST).read_bytes())
    assert open_student(str(alone), CLASSES, (SIDE, SIDE), CPU).fingerprint is None


def test_students_for_other_data_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MismatchError, match=r"in another order.*expected 3 classes, 'red' at 1; found 3 classes, 'green' at 1"
    ):
        open_student(str(run), ("blue", "red", "green"), (SIDE, SIDE), CPU)
    with pytest.raises(MismatchError, match=r"other classes.*expected 2 classes; found 3 classes, such as 'red'"):
        open_student(str(run), CLASSES[:2], (SIDE, SIDE), CPU)
    with pytest.raises(MismatchError, match=r"another size.*expected 8 × 8; found 16 × 16"):
        open_student(str(run), CLASSES, (8, 8), CPU)
    with pytest.raises(WeightsError, match="no such checkpoint"):
        open_student(str(tmp_path / "nowhere"), CLASSES, (SIDE, SIDE), CPU)


def test_a_diverged_student_is_refused(run: Path, tmp_path: Path) -> None:
    model, card = load_student(run)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    file = tmp_path / "nan.safetensors"
    save_student(file, model, card)
    with pytest.raises(DivergedError, match="not finite"):
        open_student(str(file), CLASSES, (SIDE, SIDE), CPU).logits(PIXELS)
