"""The Hugging Face hub, where timm and open_clip keep weights: what to do when it is out of reach."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

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
