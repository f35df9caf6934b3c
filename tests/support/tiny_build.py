"""Build recipes that run fast: small tinted images, an untrained resnet8, the CLIP of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.recipe import BuildRecipe
from tests.support import tiny_run
from train.checkpoints import StudentCard, save_student
from train.students import create_student


def write_teacher(
    path: Path, class_names: tuple[str, ...] = tiny_run.CLASSES, architecture: str = "resnet8", seed: int = 0
) -> Path:
    """Write a checkpoint like train-student's, with random weights."""
    torch.manual_seed(seed)
    student = create_student(architecture, len(class_names))
    card = StudentCard(
        architecture=architecture,
        num_classes=len(class_names),
        class_names=class_names,
        image_size=(tiny_run.SIDE, tiny_run.SIDE),
        mean=(0.4, 0.4, 0.4),
        std=(0.25, 0.25, 0.25),
        dataset="folder",
        recipe_digest="0" * 64,
    )
    save_student(path, student, card)
    return path


def recipe(root: Path, **changes: Any) -> BuildRecipe:
    """Three views of the images in `root/pictures`, float32, no preflight because the teacher is untrained."""
    data: dict[str, Any] = {
        "name": "tiny",
        "dataset": tiny_run.dataset(root / "pictures").model_dump(),
        "views": {"base_seed": 11, "ops": ["pad-crop", "flip"]},
        "num_views": 3,
        "teacher": {"name": str(root / "teacher.safetensors")},
        "clip": {"name": "local-dir:package:digits-clip", "class_names": ("zero", "one", "two")},
        "fusion": {"feature_dim": 16},
        "codec": "float32",
        "batch_size": 32,
        "block_rows": 64,
        "preflight_samples": 0,
        "device": "cpu",
        "out": root / "cache.zarr",
    }
    return BuildRecipe.model_validate(data | changes)


def prepare(root: Path, *, train: int = 150) -> Path:
    """Write the files that `recipe(root)` needs."""
    tiny_run.write_pictures(root / "pictures", train=train)
    write_teacher(root / "teacher.safetensors")
    return root


def constant_teacher(folder: Path) -> Path:
    """Write a teacher that gives every image the same logits."""
    path = write_teacher(folder / "constant.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        weights = {name: torch.zeros_like(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    save_file(weights, path, metadata)
    return path


def files_of(path: Path) -> dict[str, bytes]:
    """The content of every file below a folder, partial files left out."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and not file.name.endswith(".partial")
    }


def arrays_of(path: Path) -> dict[str, bytes]:
    """The content of every file except the manifest, which has the date."""
    files = files_of(path)
    del files["zarr.json"]
    return files
