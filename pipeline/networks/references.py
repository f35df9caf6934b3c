"""Resolve a recipe's names of weights: files, files of the package, or entries of a library or hub. No torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from cache_tools.system.arguments import expand_user
from train.weights.names import hub_names, looks_like_file

if TYPE_CHECKING:
    from pipeline.recipe import BuildRecipe, ClipSpec, TeacherSpec

PACKAGE_PREFIX = "package:"
LIBRARIES = ("timm:", "torchvision:")
HUB_PREFIX, FOLDER_PREFIX = "hf-hub:", "local-dir:"  # of names, as in open_clip and timm
_CLASS_FILES = (
    "class_to_idx.json", "idx_to_class.json", "class_names.json", "classes.json", "labels.json", "config.json",
    "class_names.txt", "classes.txt", "labels.txt",
)  # fmt: skip


def is_file_reference(reference: str) -> bool:
    """Whether `reference` names a file (`package:FILE`, a path) rather than a library's tag."""
    return reference.startswith(PACKAGE_PREFIX) or looks_like_file(reference)


def resolve_path(reference: str) -> Path:
    """The path of a reference; `package:NAME` is a file or folder in pipeline/assets."""
    if reference.startswith(PACKAGE_PREFIX):
        return Path(str(files("pipeline") / "assets" / reference.removeprefix(PACKAGE_PREFIX)))
    return expand_user(reference)


def names_to_download(recipe: BuildRecipe) -> list[str]:
    """The names of a recipe's networks that a library may have to download."""
    published: list[TeacherSpec | ClipSpec] = [
        *(spec for spec in recipe.teachers if spec.name.startswith(LIBRARIES)),
        *(spec for spec in recipe.clips if not spec.name.startswith(FOLDER_PREFIX)),
    ]
    names = [spec.name for spec in published if spec.weights is None or not is_file_reference(spec.weights)]
    return list(dict.fromkeys([*names, *(name for spec in recipe.teachers for name in hub_names(spec.name))]))


def class_files(weights: Path) -> list[Path]:
    """The files in the folder of weights that may have the class names of their outputs."""
    folder = weights if weights.is_dir() else weights.parent
    return [folder / name for name in _CLASS_FILES if (folder / name).is_file()]
