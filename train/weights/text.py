"""Words for messages about names and about the errors of other libraries."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LINE_LIMIT = 160


def nearest(word: str, names: Iterable[str]) -> str | None:
    """A message's next step that suggests the most similar name; None if no name is similar."""
    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.5)
    return f"did you mean '{by_lower[close[0]]}'?" if close else None


def first_line(error: BaseException) -> str:
    """Type and first line of a library's exception, cut to fit into a one-line message."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines[0]) <= LINE_LIMIT else f"{lines[0][:LINE_LIMIT]}…"
    return f"{type(error).__name__}: {text}".removesuffix(": ").rstrip(".")


def several(names: Iterable[str], most: int = 3) -> str:
    """The first names of many, and how many more there are."""
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more
