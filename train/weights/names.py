"""Names of weights: files, or entries of a library or hub. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from cache_tools.errors import WeightsError

Loaded = TypeVar("Loaded")

SUFFIXES = frozenset({".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".tgz"})


def looks_like_file(reference: str) -> bool:
    """Whether a reference names a file rather than a library's tag."""
    path = Path(reference).expanduser()
    return path.suffix in SUFFIXES or len(path.parts) > 1 or path.is_file()


def is_path(reference: str) -> bool:
    """Whether a reference names a file or folder rather than a library's tag."""
    return looks_like_file(reference) or Path(reference).expanduser().is_dir()


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


def files_digest(path: Path) -> str:
    """64 hex digits over the content of a file, or of the weights in a folder.

    Raises:
        WeightsError: there is no such file.
    """
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    if not found:
        raise WeightsError("no such weights", where=path, expected="a file of torch.save or safetensors, or a folder")
    digest = hashlib.sha256()
    for file in found:
        status = file.stat()
        digest.update(_file_digest(file, status.st_mtime_ns, status.st_size))
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _file_digest(path: Path, modified: int, size: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
