"""What the user has set on the command line: dotted keys with their values, and the words in which they were typed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cache_tools.config.text import parse_yaml
from cache_tools.errors import RecipeError


def given_settings(overrides: Iterable[str] = (), options: Mapping[str, Any] | None = None) -> list[tuple[str, Any]]:
    """The (dotted key, value) pairs of command-line options and, after them, of `--set` items.

    Raises:
        RecipeError: an item that is not `key=YAML value`.
    """
    settings = [(key, value) for key, value in (options or {}).items() if value is not None]
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key.strip():
            raise RecipeError("cannot read --set", where=item, expected="--set key=value", found=repr(item))
        value = parse_yaml(text, "cannot read the value of --set", where=abridged(item))
        settings.append((key.strip(), value))
    return settings


def typed_settings(
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Dotted key → what the user typed to set it, for messages: `--lr`, or `--set lr=0.1`.

    Args:
        names: dotted key → name of its option, where that is not the last part of the key.
    """
    typed = {key: option_name(key, names) for key, value in (options or {}).items() if value is not None}
    return typed | {item.partition("=")[0].strip(): f"--set {abridged(item, quote=False)}" for item in overrides}


def option_name(key: str, names: Mapping[str, str] | None = None) -> str:
    """The name of the option that sets a dotted key."""
    return (names or {}).get(key) or f"--{key.rpartition('.')[2].replace('_', '-')}"


def find_typed(typed: Mapping[str, str], key: str) -> str | None:
    """What the user typed to set a dotted key, the part that it is in, or something in it; None for nothing."""
    around = [one for one in typed if f"{key}.".startswith(f"{one}.")]
    inside = [one for one in typed if one.startswith(f"{key}.")]
    found = max(around, key=len, default=None) or next(reversed(inside), None)
    return None if found is None else typed[found]


def set_dotted(data: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.c` in nested dictionaries in place, where digits index lists."""
    *parents, last = key.split(".")
    node: Any = data
    for name in parents:
        if isinstance(node, list) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
            continue
        if not isinstance(node, dict):
            raise _no_such_parent(node, key, name)
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise _no_such_parent(node, key, last)


def abridged(value: object, *, quote: bool = True) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value) if quote else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _no_such_parent(node: Any, key: str, name: str) -> RecipeError:
    if not isinstance(node, list):
        return RecipeError("cannot set a key below a plain value", where=key, found=abridged(node))
    return RecipeError(
        "cannot set a key of a whole list",
        where=key,
        expected=f"the number of an entry, 0 to {len(node) - 1}, where '{name}' is",
        next_step=f"name the entry, as in --set {key.replace(f'.{name}', f'.0.{name}', 1)}=…",
    )
