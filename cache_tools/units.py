"""Sizes and durations, as people write and read them."""

from __future__ import annotations

import re

from cache_tools.errors import RecipeError

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_SIZE_UNITS = ("B", "KB", "MB", "GB", "TB", "PB", "EB")
# ByteSize alone also accepts a number without a unit, and any text after the unit.
_SIZE = re.compile(r"\s*[0-9]+([.][0-9]+)?\s*([KMGTPE]I?)?B\s*", re.IGNORECASE)
_DURATION = re.compile(r"\s*([0-9]+(?:[.][0-9]+)?)\s*([smhdw])\s*")


def counted(count: int, noun: str) -> str:
    """A number with its noun, such as `1 file` or `2 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def human_bytes(count: int) -> str:
    """Format a size in powers of 1000: `12.3 MB`."""
    size = float(count)
    for unit in _SIZE_UNITS[:-1]:
        if abs(size) < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} {_SIZE_UNITS[-1]}"


def num_bytes(text: str) -> int:
    """Parse a size: `100GB` and `500 MB` are powers of 1000, `2GiB` is a power of 1024.

    Raises:
        RecipeError: anything else.
    """
    if not _SIZE.fullmatch(text):
        raise RecipeError("cannot read the size", where=text, expected="a size such as 100GB or 500MB")
    from pydantic import ByteSize, TypeAdapter  # takes longer to import than `cache-tools ls` runs

    return int(TypeAdapter(ByteSize).validate_python(text))


def duration(seconds: float) -> str:
    """Format a duration in the units that people use: `3.2 s`, `45 s`, `12 min 30 s`, `1 h 05 min`, `2 d 3 h`."""
    whole = round(seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def seconds(text: str) -> float:
    """Parse a duration: `30d`, `12h`, `90m`, `2w`.

    Raises:
        RecipeError: anything else.
    """
    match = _DURATION.fullmatch(text)
    if not match:
        raise RecipeError("cannot read the duration", where=text, expected="a time such as 30d, 12h or 2w")
    return float(match[1]) * _SECONDS[match[2]]
