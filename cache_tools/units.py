"""Sizes and durations as people type and read them."""

from __future__ import annotations

import re

from cache_tools.errors import RecipeError

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}

_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def human_bytes(count: int) -> str:
    """`12.3 MB`, in powers of 1000."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"


def seconds(text: str) -> float:
    """`30d`, `12h`, `90m`, `2w` in seconds.

    Raises:
        RecipeError: anything else.
    """
    return _quantity(text, _SECONDS, "a time such as 30d, 12h or 2w", ignore_case=False)


def num_bytes(text: str) -> int:
    """`100GB`, `500 MB` in bytes (powers of 1000).

    Raises:
        RecipeError: anything else.
    """
    return int(_quantity(text, _BYTES, "a size such as 100GB or 500MB", ignore_case=True))


def _quantity(text: str, units: dict[str, int], expected: str, *, ignore_case: bool) -> float:
    match = re.fullmatch(r"\s*([0-9]+(?:[.][0-9]+)?)\s*([A-Za-z]+)\s*", text)
    unit = match[2].upper() if match and ignore_case else match[2] if match else ""
    if match is None or unit not in units:
        raise RecipeError("cannot be understood", where=text, expected=expected)
    return float(match[1]) * units[unit]
