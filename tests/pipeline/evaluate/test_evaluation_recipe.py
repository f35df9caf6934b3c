"""`evaluation` of a recipe: the transform of test images in training, evaluate-student and export-student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from cache_tools.config import dump_yaml
from cache_tools.errors import RecipeError
from cache_tools.images import open_images
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.reader import TeacherCache
from pipeline.build.cache import build_cache
from pipeline.build.preflight import Preflight
from pipeline.networks.ensemble import load_ensemble
from tests.support import tiny_build, tiny_run
from tests.support.in_process import invoke
from train.checkpoints import load_student, read_card
from train.data import open_data
from train.evaluate.metrics import evaluate_logits
from train.recipe import TrainRecipe
from train.recipe.loading import load_train_recipe
from train.run import train_student

CPU = torch.device("cpu")
VIEWS: dict[str, Any] = {"version": 2, "ops": [{"op": "random-resized-crop", "size": 14}, "flip"]}
CHOSEN = {"resize": 24, "crop": 20, "interpolation": "bilinear"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many sizes."""
    root = tmp_path_factory.mktemp("evaluation")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 12)):
        for number in range(count):
            label = number % 3
            pixels = rng.integers(0, 160, (30 + 3 * (number % 7), 50 - 4 * (number % 8), 3))
            pixels[..., 2 - label] += 60
            file = root / "pictures" / split / tiny_run.CLASSES[label] / f"{number:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    return root


def on_labels(root: Path, name: str, **changes: Any) -> TrainRecipe:
    dataset = {"name": "folder", "data_dir": str(root / "pictures")}
    settings = {"loss": {"kind": "ce"}, "dataset": dataset, "views": VIEWS, "epochs": 1, "loggers": ()}
    return tiny_run.recipe("", root / name, **settings | {"batch_size": 12} | changes)


def files_of(root: Path) -> list[Path]:
    return sorted((root / "pictures" / "test").rglob("*.png"))


def by_timm(root: Path, config: dict[str, Any]) -> torch.Tensor:
    """The test images by timm's own transform of a `pretrained_cfg`."""
    transform = create_transform(
        tuple(config["input_size"]),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )
    return torch.stack([transform(Image.open(file).convert("RGB")) for file in files_of(root)])


@pytest.mark.medium
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_evaluation_and_export_use_the_transform(root: Path, interpolation: str) -> None:
    """All three give the figures of timm's transform, straight from the files, with the exported config."""
    name = f"run-{interpolation}"
    result = train_student(on_labels(root, name, evaluation=CHOSEN | {"interpolation": interpolation}))
    card = read_card(root / name / "last.safetensors")
    assert (card.image_size, card.test_size, card.interpolation) == ((14, 14), (20, 20), interpolation)
    assert invoke("export-student", root / name, "--format", "safetensors").exit_code == 0
    config = json.loads((root / name / "export" / "config.json").read_text())["pretrained_cfg"]
    assert config["input_size"] == [3, 20, 20]
    assert config["crop_pct"] == pytest.approx(20 / 24)
    assert config["interpolation"] == interpolation
    model, _ = load_student(root / name)
    labels = torch.from_numpy(open_images(on_labels(root, name).own_dataset(), "test").labels)
    with torch.no_grad():
        expected = evaluate_logits(model(by_timm(root, config)), labels).model_dump()
    assert result.last is not None
    assert result.last.model_dump() == pytest.approx(expected, abs=1e-4)
    done = invoke("evaluate-student", root / name, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["figures"][0]["evaluation"] == pytest.approx(expected, abs=1e-4)
    default = evaluate_logits(model(by_timm(root, config | {"input_size": [3, 14, 14], "crop_pct": 7 / 8})), labels)
    assert default.nll != pytest.approx(expected["nll"], abs=1e-4)


@pytest.mark.parametrize(
    ("evaluation", "size", "canvas"),
    [
        ({}, (14, 14), 16),
        ({"crop": 21}, (21, 21), 24),
        ({"resize": 20}, (14, 14), 20),
        ({"crop": [12, 18], "resize": 18}, (12, 18), 18),
        ({"interpolation": "bilinear"}, (14, 14), 16),
    ],
)
def test_defaults_of_the_transform(root: Path, evaluation: dict[str, Any], size: Any, canvas: int) -> None:
    """Views that crop: the shorter side is resized to crop / 0.875."""
    data = open_data(on_labels(root, "unused", evaluation=evaluation), CPU)
    assert data.test is not None
    assert (data.test_size, data.test.image_size) == (size, (canvas, canvas))
    seen = data.test_preprocessing
    assert (seen.size, seen.crop) == (size, pytest.approx(max(size) / canvas))
    assert data.images.image_size == (16, 16)


def test_images_of_one_size_are_resized_from_their_canvas() -> None:
    recipe = {"name": "digits", "loss": {"kind": "ce"}, "dataset": {"name": "digits"}, "views": {"ops": ["pad-crop"]}}
    data = open_data(TrainRecipe.model_validate(recipe | {"evaluation": {"resize": 36}}), CPU)
    assert data.test is not None
    assert (data.test_preprocessing.size, data.test_preprocessing.crop) == ((32, 32), pytest.approx(32 / 36))
    centre = open_data(TrainRecipe.model_validate(recipe | {"evaluation": {"crop": 28}}), CPU).test_preprocessing
    assert (centre.size, centre.crop) == ((28, 28), 28 / 32)


@pytest.mark.medium
def test_the_shape_is_checked_before_the_first_epoch(root: Path) -> None:
    """timm's test_vit takes multiples of 16 pixels."""
    views = {"version": 2, "ops": [{"op": "random-resized-crop", "size": 160}]}
    with pytest.raises(RecipeError, match=r"cannot take images of this size.*150 × 150.*evaluation\.crop"):
        train_student(
            on_labels(root, "vit", views=views, student="timm:test_vit", batch_size=4, evaluation={"crop": 150})
        )
    assert not (root / "vit" / "state.pt").exists()


def test_what_cannot_be_a_transform_is_refused(root: Path) -> None:
    with pytest.raises((RecipeError, ValueError), match="a resize of at least the crop, 30"):
        on_labels(root, "unused", evaluation={"crop": 30, "resize": 20})
    with pytest.raises(RecipeError, match="resized to less than the student is given"):
        open_data(on_labels(root, "unused", evaluation={"resize": 10}), CPU)


def test_recipes_and_cards_without_it_are_as_before(root: Path) -> None:
    recipe = on_labels(root, "unused")
    assert "evaluation" not in recipe.model_dump(mode="json")
    assert "evaluation" not in recipe.values()
    assert "evaluation" in on_labels(root, "unused", evaluation={"crop": 20}).values()


@pytest.mark.medium
def test_teachers_keep_their_own_transform(root: Path) -> None:
    """--teachers: their figures do not depend on the student's transform, and a student of `views.sizes` is found."""
    tiny_build.write_teacher(root / "teacher.safetensors")
    dataset = DatasetRecipe(name="folder", data_dir=root / "pictures")
    views = {**VIEWS, "sizes": {"student": 12}}
    plan = tiny_build.recipe(root, dataset=dataset.model_dump(), views=views, num_views=1, out=root / "cache.zarr")
    build_cache(plan)
    shown = []
    for name, evaluation in (("plain", {}), ("larger", {"crop": 24})):
        changes = {"batch_size": 12, "epochs": 1, "loggers": (), "evaluation": evaluation}
        train_student(tiny_run.recipe(root / "cache.zarr", root / name, **changes))
        done = invoke("evaluate-student", root / name, "--teachers", "--json")
        assert done.exit_code == 0, done.stderr
        shown.append([row["top1"] for row in json.loads(done.stdout)["teachers"]])
    assert read_card(root / "larger" / "last.safetensors").input_size == (24, 24)
    assert shown[0] == shown[1]


@pytest.mark.medium
def test_the_preflight_shows_each_network_that_part_at_its_own_size(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of teacher and CLIP by torchvision's transforms of the files."""
    monkeypatch.setattr("pipeline.build.preflight.judge_networks", lambda *_: iter(()))
    tiny_build.write_teacher(root / "teacher.safetensors")
    changes: dict[str, Any] = {
        "dataset": {"name": "folder", "data_dir": str(root / "pictures")},
        "views": {**VIEWS, "sizes": {"student": 12, "clip": 32}},
        "evaluation": {"resize": 24, "crop": 20, "interpolation": "bilinear"},
        "preflight_samples": 50,
        "num_views": 1,
        "out": root / "preflight.zarr",
    }
    plan = tiny_build.recipe(root, **changes)
    found = build_cache(plan).preflight
    assert isinstance(found, Preflight)
    images = open_images(plan.dataset, "test")
    ensemble = load_ensemble(plan.teacher, plan.clip, plan.fusion, images, plan.dataset, CPU, "float32")
    seen = []
    for size, resize in ((14, 17), (32, 38)):  # of the teacher and of CLIP: 24/20 of each
        whole = Compose([Resize(resize), CenterCrop(size), PILToTensor()])
        seen.append(torch.stack([whole(Image.open(file).convert("RGB")) for file in files_of(root)]))
    output = ensemble.outputs(*seen)
    labels = torch.from_numpy(images.labels)
    for name, logits in (("teacher", output.teachers[0].logits), ("clip", ensemble.scaled_logits(output.clips)[0])):
        assert found.networks[name] == pytest.approx(float((logits.argmax(1) == labels).double().mean())), name
    stored = TeacherCache(root / "preflight.zarr").manifest.build_recipe
    assert stored["evaluation"] == {"resize": 24, "crop": 20, "interpolation": "bilinear"}
    plain = tiny_build.recipe(root, **changes | {"evaluation": {}})
    assert "evaluation" not in plain.model_dump(mode="json")
    file = root / "plan.yaml"
    file.write_text(dump_yaml(plan))
    trained = load_train_recipe(str(file), ["loss.kind=ce"])
    assert trained.evaluation == plan.evaluation
