"""Resolve a recipe's names of weights: files, files of the package, or entries of a library or hub. No torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from train.weights.names import looks_like_file

PACKAGE_PREFIX = "package:"
HUB_PREFIX, FOLDER_PREFIX = "hf-hub:", "local-dir:"  # of names, as in open_clip and timm


def is_file_reference(reference: str) -> bool:
    """Whether `reference` names a file (`package:FILE`, a path) rather than a library's tag."""
    return reference.startswith(PACKAGE_PREFIX) or looks_like_file(reference)


def resolve_path(reference: str) -> Path:
    """The path of a reference; `package:NAME` is a file or folder in pipeline/assets."""
    if reference.startswith(PACKAGE_PREFIX):
        return Path(str(files("pipeline") / "assets" / reference.removeprefix(PACKAGE_PREFIX)))
    return Path(reference).expanduser()
