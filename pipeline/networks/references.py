"""Resolve a recipe's names of weights: files, files of the package, or entries of a library or hub. No torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

Loaded = TypeVar("Loaded")

PACKAGE_PREFIX = "package:"
HUB_PREFIX, FOLDER_PREFIX = "hf-hub:", "local-dir:"  # of CLIP names, as in open_clip
FILE_SUFFIXES = frozenset({".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".tgz"})


def is_file_reference(reference: str) -> bool:
    """Whether `reference` names a file (`package:FILE`, a path) rather than a library's tag."""
    path = Path(reference)
    return reference.startswith(PACKAGE_PREFIX) or path.suffix in FILE_SUFFIXES or len(path.parts) > 1 or path.is_file()


def resolve_path(reference: str) -> Path:
    """The path of a reference; `package:NAME` is a file or folder in pipeline/assets."""
    if reference.startswith(PACKAGE_PREFIX):
        return Path(str(files("pipeline") / "assets" / reference.removeprefix(PACKAGE_PREFIX)))
    return Path(reference).expanduser()


def load_local_first(load: Callable[[], Loaded]) -> Loaded:
    """Call `load` with the hub's local copies only; if that fails, call it again with the network.

    timm and open_clip do not pass `local_files_only` on to huggingface_hub. Its offline mode has the same effect on
    every download inside `load`. A user's own `HF_HUB_OFFLINE=1` is respected.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return load()
    constants.HF_HUB_OFFLINE = True
    try:
        return load()
    except Exception:  # the libraries wrap the hub's LocalEntryNotFoundError in errors of many types
        pass
    finally:
        constants.HF_HUB_OFFLINE = False
    return load()
