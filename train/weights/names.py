"""Names of weights: files, or entries of a library or hub. No torch."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from cache_tools.console import unescaped_output
from cache_tools.errors import WeightsError
from cache_tools.system import named
from cache_tools.system.arguments import expand_user

Loaded = TypeVar("Loaded")

ALLOWED = "TEACHER_CACHE_NETWORKS"  # environment: names of networks, with commas
_NO_LOCAL_COPY = {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}  # errors of huggingface_hub

SUFFIXES = frozenset({".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".tgz"})


def looks_like_file(reference: str) -> bool:
    """Whether a reference names a file rather than a library's tag."""
    path = expand_user(reference)
    return path.suffix in SUFFIXES or len(path.parts) > 1 or path.is_file()


def is_path(reference: str) -> bool:
    """Whether a reference names a file or folder rather than a library's tag."""
    return looks_like_file(reference) or expand_user(reference).is_dir()


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
    with unescaped_output():  # bars of the download
        return load()


class RefusedError(ConnectionError):
    """A connection for a network that only a received file names."""


_refusing = 0  # depth of `only_named` blocks for networks that the user has not named
_hook_is_set = False


@contextmanager
def only_named(names: Iterable[str], where: object) -> Iterator[None]:
    """Inside, load networks that a received file names: from local copies only, unless the user has named them before.

    Args:
        names: of the networks, as the file has them; those in $TEACHER_CACHE_NETWORKS count as named.
        where: the file, for errors.

    Raises:
        WeightsError: there is no local copy.
    """
    global _refusing
    allowed = {part.strip() for part in os.environ.get(ALLOWED, "").split(",")}
    unnamed = [name for name in names if name not in allowed and not named.is_named("networks", name)]
    if not unnamed:
        yield
        return
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    _refuse_connections()
    _refusing += 1
    try:
        yield
    except Exception as error:
        if not _needs_a_connection(error):
            raise
        raise WeightsError(
            "to load this network, files have to be downloaded, and you have not named it before",
            where=where,
            found=", ".join(unnamed),
            next_step=f"if you trust its source, set {ALLOWED}='{','.join(unnamed)}' and run the command again",
        ) from error
    finally:
        _refusing -= 1
        constants.HF_HUB_OFFLINE = before


def hub_names(architecture: str) -> list[str]:
    """The name of an architecture itself if its code is timm's and its config comes from a hub; else nothing."""
    return [architecture] if architecture.startswith("timm:") and ":" in architecture.removeprefix("timm:") else []


def remember(names: Iterable[str]) -> None:
    """Record that the user has named these networks: they may be downloaded for received files from now on."""
    for name in names:
        named.remember("networks", name)


def _refuse_connections() -> None:
    """Let Python's sockets fail while `only_named` refuses: libraries download in many ways."""
    global _hook_is_set
    if not _hook_is_set:
        sys.addaudithook(_refuse)
        _hook_is_set = True


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if not _refusing or event not in {"socket.connect", "socket.getaddrinfo", "urllib.Request"}:
        return
    if event != "socket.connect" or isinstance(arguments[1], tuple):  # not sockets of this machine's file system
        raise RefusedError("no connection for a network that only a received file names")


def _needs_a_connection(error: BaseException | None) -> bool:
    """Whether the hub or a library found no local copy: their error, or ours, is somewhere in the chain."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, RefusedError) or type(error).__name__ in _NO_LOCAL_COPY:
            return True
        error = error.__cause__ or error.__context__
    return False


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
