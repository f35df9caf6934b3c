"""Places where files can be: a folder, or a prefix of an object store (s3://, gs://, az://, http://…).

A place stores whole files under relative keys with `/`. A file that is put appears in full or not at all.
"""

from __future__ import annotations

import re
from pathlib import Path

from cache_tools.errors import RecipeError
from cache_tools.storage.base import Entry, Place
from cache_tools.storage.local import LocalPlace
from cache_tools.storage.remote import RemotePlace
from cache_tools.system import named
from cache_tools.system.arguments import expand_user

__all__ = [
    "Entry",
    "LocalPlace",
    "Place",
    "RemotePlace",
    "is_remote",
    "is_url",
    "local_folder",
    "local_path",
    "open_place",
    "remote_url",
]

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_FILE = "file://"
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/{1,2}(?P<rest>[^/].*)", re.IGNORECASE)


def open_place(reference: str | Path, *, patience_s: float | None = None) -> Place:
    """The place that a path or URL names, whether or not anything is there.

    Only for what a user has named: the URL is remembered (`cache_tools.system.named`). A URL in a received file is
    opened only if the user has named it before.

    Args:
        patience_s: how long failed requests to an object store are repeated; PATIENCE_S by default.

    Raises:
        RecipeError: a malformed URL, or one of an unknown scheme.
        NotFoundError: a URL, and obstore is not installed.
    """
    if is_remote(reference):
        place = RemotePlace(str(reference), patience_s)
        named.remember("stores", str(place))
        return place
    return LocalPlace(local_path(reference))


def local_path(reference: str | Path) -> Path:
    """The path that a user gave, with `~` and `file://` resolved. It ends in a name, so that files can be beside it."""
    path = expand_user(str(reference).removeprefix(_FILE))
    return path.resolve() if path.name in {"", ".."} else path


def is_url(reference: str | Path) -> bool:
    """Whether a reference is a URL rather than a path or a name."""
    return isinstance(reference, str) and _SCHEME.match(reference) is not None


def is_remote(reference: str | Path) -> bool:
    """Whether a reference is the URL of an object store; `file://…` is a folder."""
    return is_url(reference) and not str(reference).startswith(_FILE)


def remote_url(reference: str | Path) -> str | None:
    """The URL of an object store that a reference is, with both slashes if it is a path; None for others."""
    match = _URL.fullmatch(str(reference))
    return None if match is None or match["scheme"] == "file" else f"{match['scheme']}://{match['rest']}"


def local_folder(out: str | None) -> Path | None:
    """The value of `--out` of a command that writes to disks only, as a path; None stays None.

    Raises:
        RecipeError: the URL of an object store.
    """
    if out is None:
        return None
    place = None if is_remote(out) else open_place(out)
    if not isinstance(place, LocalPlace):
        raise RecipeError(
            "this command writes to a folder, not to an object store",
            where=out,
            next_step="leave out --out, then copy the cache there with `cache-tools push`",
        )
    return place.path
