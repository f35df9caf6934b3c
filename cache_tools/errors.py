"""One error tree. Every message says what went wrong, where, what was expected and found, and what to do next.

Commands print the message and exit with code 2. A traceback means a bug in teacher-cache.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

MAX_PART, MAX_PATH = 1200, 4200  # characters of a part of a message; text from a file may be of any length


class CacheError(Exception):
    """Base of everything teacher-cache raises on bad input.

    Args:
        what: what went wrong, one sentence without a full stop.
        where: the file, key, array or device.
        expected: what would have been right.
        found: what was there instead.
        next_step: what the user can do, an imperative or a question.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        next_step: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.found, self.next_step = what, where, expected, found, next_step
        super().__init__(self._message())

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors come out of worker processes with their message and their parts, which may not be picklable."""
        data = error_to_data(self)
        parts: dict[str, Any] = {key: data[key] for key in ("where", "expected", "found", "next_step")}
        return partial(type(self), **parts), (self.what,)

    def _message(self) -> str:
        where = "" if self.where is None else f" ({_abridged(str(self.where), MAX_PATH)})"
        parts = [f"{_abridged(self.what)}{where}"]
        if self.expected is not None:
            parts.append(_abridged(f"expected {self.expected}"))
        if self.found is not None:
            parts.append(_abridged(f"found {self.found}"))
        message = "; ".join(parts) + "."
        if self.next_step is not None:
            message += f" {self.next_step[:1].upper()}{self.next_step[1:]}" + (
                "" if self.next_step.endswith("?") else "."
            )
        return printable(" ".join(message.split()))


class RecipeError(CacheError):
    """A recipe, an option or a `--set` value is invalid."""


class DataError(CacheError):
    """A dataset is missing, or an image cannot be decoded."""


class WeightsError(CacheError):
    """The weights of a teacher, CLIP or student are missing or do not fit."""


class PreflightError(CacheError):
    """The teachers would make a useless cache."""


class FormatError(CacheError):
    """The manifest or the arrays of a cache break the format."""


class UnknownFormatError(FormatError):
    """An intact manifest in a format that this version of teacher-cache does not know."""


class UnsafeFileError(FormatError):
    """A link, pipe, device or socket where a cache or a run must have a file or a folder."""


class NotFoundError(CacheError):
    """There is no cache of that path, name or fingerprint."""


class IncompleteError(CacheError):
    """A cache, or a view of it, is not completely built."""


class DroppedError(CacheError):
    """A view of a cache is gone: it was dropped behind the students that followed the build."""


class MismatchError(CacheError):
    """The dataset, views or recipe differ from those of the cache."""


class StorageError(CacheError):
    """A disk or store is full, read-only or out of reach."""


class DeviceError(CacheError):
    """This machine does not have the device."""


class OutOfMemoryError(DeviceError):
    """The process or the device ran out of memory."""


class RankLostError(CacheError):
    """Another process of the same work has ended."""


class DivergedError(CacheError):
    """The loss or the logits are NaN or infinite."""


def printable(text: str, keep: str = "") -> str:
    """Escape control characters, marks that change the direction of text, invisible ones and lone surrogates.

    Names in received files may hold any of them. Escaped, as `\\x1b` or `\\u202e`, they cannot affect a terminal,
    forge a line or hide a part of a name.

    Args:
        keep: characters that stay as they are, such as the line ends of a text of several lines.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else ascii(each)[1:-1] for each in text)


def error_to_data(error: CacheError) -> dict[str, str | None]:
    """Convert an error to plain data that another process can read; `kind` is its class."""
    parts = {part: getattr(error, part) for part in ("what", "where", "expected", "found", "next_step")}
    return {"kind": type(error).__name__, **{key: None if part is None else str(part) for key, part in parts.items()}}


def error_from_data(data: Mapping[str, Any]) -> CacheError:
    """Restore the error from the data of `error_to_data`."""
    parts = {key: data.get(key) for key in ("where", "expected", "found", "next_step")}
    kind: type[CacheError] = getattr(sys.modules[__name__], str(data["kind"]), CacheError)
    return kind(data["what"], **parts)


def _abridged(text: str, most: int = MAX_PART) -> str:
    """Cut text to `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
