"""What a recipe's words for weights mean: files, files of the package, or names in a library. No torch here."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

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


CONNECT_TIMEOUT_S = 3.0


@contextmanager
def hub_or_local_copies() -> Iterator[None]:
    """Let libraries use the hub; without a network they take local copies or fail at once.

    Left alone, huggingface_hub tries for most of a minute and prints every attempt.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _reachable(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _reachable(endpoint: str) -> bool:
    """Whether a connection can be opened; assumed where a proxy decides."""
    address = urlsplit(endpoint)
    if not address.hostname or {"all", address.scheme} & getproxies().keys():
        return True
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True
