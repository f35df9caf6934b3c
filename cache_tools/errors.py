"""One error tree: every message says what, where, expected, found and the next step.

Commands print the message as it is and leave with exit code 2; a traceback means a bug in teacher-cache.
"""

from __future__ import annotations

MAX_PART, MAX_PATH = 1200, 4200


class CacheError(Exception):
    """Base of everything teacher-cache raises on bad input.

    Args:
        what: what went wrong, one sentence without a full stop.
        where: file, key, array or device concerned.
        expected: what would have been right.
        found: what was there instead.
        next_step: what the reader can do now, an imperative.
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


def _abridged(text: str, most: int = MAX_PART) -> str:
    """What came out of a file may be of any length."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def printable(text: str) -> str:
    """Text that does nothing to a terminal: control characters and halves of characters as escapes."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


class RecipeError(CacheError):
    """A recipe, an option or a `--set` that cannot be understood."""


class DataError(CacheError):
    """A dataset that is missing, or an image that cannot be decoded."""


class WeightsError(CacheError):
    """A teacher, CLIP or student whose weights are missing or do not fit."""


class PreflightError(CacheError):
    """Teachers that would make a useless cache."""


class FormatError(CacheError):
    """A cache whose manifest or arrays are not what the format says."""


class UnknownFormatError(FormatError):
    """A manifest that is as it was written, but not by this version of teacher-cache."""


class NotFoundError(CacheError):
    """No cache of that path, name or fingerprint."""


class IncompleteError(CacheError):
    """A cache, or a view of it, that is not completely built yet."""


class MismatchError(CacheError):
    """Dataset, views or recipe that are not the ones the cache was built with."""


class StorageError(CacheError):
    """A disk or store that is full, read-only or out of reach."""


class DeviceError(CacheError):
    """A device that this machine does not have."""


class OutOfMemoryError(DeviceError):
    """A process or a device that has too little memory for the work."""


class DivergedError(CacheError):
    """A loss or logits that are NaN or infinite."""
