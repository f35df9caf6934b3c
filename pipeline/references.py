"""What a recipe's words for weights mean: files, files of the package, or names in a library. No torch here."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

PACKAGE_PREFIX = "package:"
HUB_PREFIX, FOLDER_PREFIX = "hf-hub:", "local-dir:"  # of CLIP names, as open_clip has them
FILE_SUFFIXES = frozenset({".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".tgz"})


def is_file_reference(reference: str) -> bool:
    """Whether `reference` means a file (`package:FILE`, a path) rather than a library's tag."""
    path = Path(reference)
    return reference.startswith(PACKAGE_PREFIX) or path.suffix in FILE_SUFFIXES or len(path.parts) > 1 or path.is_file()


def resolve_path(reference: str) -> Path:
    """A path; `package:NAME` is a file or folder shipped in pipeline/assets."""
    if reference.startswith(PACKAGE_PREFIX):
        return Path(str(files("pipeline") / "assets" / reference.removeprefix(PACKAGE_PREFIX)))
    return Path(reference).expanduser()
