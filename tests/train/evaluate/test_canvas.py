"""Test images are brought to the size of the views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cache_tools.errors import RecipeError
from cache_tools.images import open_images
from cache_tools.preprocess import prepare, resize_and_crop
from tests.support import tiny_run
from train.checkpoints import load_student, read_card
from train.data import open_data
from train.evaluate.canvas import crop_fraction, evaluation_preprocessing
from train.evaluate.metrics import evaluate_logits
from train.run import train_student

CPU = torch.device("cpu")
NORMALISATION = ((0.0,) * 3, (1.0,) * 3)
CROPPED: dict[str, Any] = {"clean_first": False, "ops": [{"op": "random-resized-crop", "size": 14}]}


def seen(pixels: np.ndarray, view: tuple[int, int]) -> np.ndarray:
    """What a student of these views sees of one picture uint8 [H, W, 3]."""
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    preprocessing = evaluation_preprocessing(view, pixels.shape[:2], NORMALISATION)
    return resize_and_crop(tensor, preprocessing)[0].permute(1, 2, 0).numpy()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("view", "canvas", "top", "left"),
    [
        ((224, 224), (256, 256), 16, 16),
        ((28, 28), (32, 32), 2, 2),
        ((224, 224), (232, 232), 4, 4),
        ((28, 30), (32, 32), 2, 1),
    ],
)
def test_a_slightly_smaller_view_is_the_centre_of_the_canvas(
    view: tuple[int, int], canvas: tuple[int, int], top: int, left: int
) -> None:
    pixels = noise(*canvas)
    np.testing.assert_array_equal(seen(pixels, view), pixels[top : top + view[0], left : left + view[1]])


@pytest.mark.parametrize(("view", "canvas", "resized"), [(96, 256, 110), (32, 64, 37), (64, 32, 64)])
def test_other_views_are_crops_of_the_resized_canvas(view: int, canvas: int, resized: int) -> None:
    """Resized as PIL does, to view · 8/7 from a larger canvas and to the view itself from a smaller one."""
    pixels = noise(canvas, canvas)
    whole = np.asarray(Image.fromarray(pixels).resize((resized, resized), Image.Resampling.BICUBIC))
    start = round((resized - view) / 2)
    expected = whole[start : start + view, start : start + view].astype(int)
    assert np.abs(seen(pixels, (view, view)).astype(int) - expected).max() <= 1


def test_equal_sizes_change_nothing() -> None:
    preprocessing = evaluation_preprocessing((32, 32), (32, 32), NORMALISATION)
    assert (preprocessing.size, preprocessing.crop) == (None, 1.0)
    assert crop_fraction((32, 32), (32, 32)) == crop_fraction((64, 64), (32, 32)) == 1.0
    assert crop_fraction((224, 224), (256, 256)) == crop_fraction((96, 96), (256, 256)) == 7 / 8
    assert preprocessing.model_dump(mode="json").keys() == {"size", "interpolation", "mean", "std"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_pictures(tmp_path_factory.mktemp("canvas") / "pictures", train=24, test=9)


def on_labels(pictures: Path, out: Path, **changes: Any) -> Any:
    settings = {"loss": {"kind": "ce"}, "dataset": tiny_run.dataset(pictures), "views": CROPPED}
    return tiny_run.recipe("", out, **{"epochs": 1, "loggers": (), **settings, **changes})


@pytest.mark.medium
def test_a_run_is_evaluated_at_the_size_of_its_views(pictures: Path, tmp_path: Path) -> None:
    """Canvas 16, views 14: the centre of each test picture, by a plain computation."""
    result = train_student(on_labels(pictures, tmp_path / "run"))
    card = read_card(tmp_path / "run" / "last.safetensors")
    assert (card.image_size, card.crop) == ((14, 14), 7 / 8)
    assert result.test_preprocessing == card.preprocessing((16, 16))
    model, _ = load_student(tmp_path / "run")
    test = open_images(tiny_run.dataset(pictures), "test")
    centre = torch.from_numpy(test.load(slice(None))[:, :, 1:15, 1:15])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (card.mean, card.std))
    with torch.no_grad():
        logits = model((centre.float() / 255 - mean) / std)
    expected = evaluate_logits(logits, torch.from_numpy(test.labels))
    assert result.last is not None
    assert result.last.model_dump() == pytest.approx(expected.model_dump(), abs=1e-4)


@pytest.mark.medium
def test_a_fixed_size_student_trains_on_its_views_and_fails_early_on_others(pictures: Path, tmp_path: Path) -> None:
    """timm's test_vit takes 160 × 160 pixels only."""
    views = {"ops": [{"op": "random-resized-crop", "size": 160}]}
    settings = {"student": "timm:test_vit", "batch_size": 12}
    result = train_student(on_labels(pictures, tmp_path / "fits", views=views, **settings))
    assert result.last is not None
    assert result.last.n == 9
    with pytest.raises(RecipeError, match="cannot take images of this size"):
        train_student(on_labels(pictures, tmp_path / "other", **settings))
    assert not (tmp_path / "other" / "state.pt").exists()


def test_the_training_input_is_the_view_as_it_is(pictures: Path, tmp_path: Path) -> None:
    data = open_data(on_labels(pictures, tmp_path), CPU)
    view = torch.zeros((2, 3, *data.view_size), dtype=torch.uint8)
    assert prepare(view, data.preprocessing).shape == view.shape
