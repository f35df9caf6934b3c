"""Class names: lists of them in files, and the orders that people sort them in."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache_tools.config.text import parse_json, read_text
from cache_tools.errors import DataError, RecipeError
from cache_tools.system.arguments import expand_user, unprintable

Names = tuple[str, ...]

MAX_LISTED = 8
MAX_NAMES_BYTES = 16 << 20
_NUMBERS = re.compile(r"([0-9]+)")


def natural_key(name: str) -> tuple[int | str, ...]:
    """Sort key by which `2` comes before `10`; case does not matter, as in timm."""
    return tuple(int(part) if part.isdigit() else part for part in _NUMBERS.split(name.lower()))


# The orders that class names are sorted in. Names that tie keep the order of `sorted`.
ORDERS: dict[str, Callable[[Names], Names]] = {
    "sorted": lambda names: tuple(sorted(names)),  # by code points: torchvision's ImageFolder, Keras
    "natural": lambda names: tuple(sorted(sorted(names), key=natural_key)),  # timm
    "case-blind": lambda names: tuple(sorted(sorted(names), key=str.casefold)),  # file managers, Windows
    "reversed": lambda names: tuple(sorted(names, reverse=True)),
}

# ImageNet's lists of classes, which are in the order of the outputs of its networks, as timm names their files.
IMAGENETS = {"imagenet-1k": "imagenet", "imagenet-12k": "imagenet12k", "imagenet-22k": "imagenet22k"}


def read_names(value: Any, *, where: str, orders: Sequence[str] = ()) -> Any:
    """The class names that a key of a recipe gives: a file is replaced by the names in it, all else is returned.

    A file has one name per line in UTF-8, or JSON that `names_in` understands.

    Args:
        where: the key, for messages.
        orders: words that the key may have instead of a file.

    Raises:
        RecipeError: no such file, or an empty line or no names in it.
    """
    if isinstance(value, list | tuple):  # YAML reads a class named 7 as a number
        return [str(name) if _is_number(name) else name for name in value]
    if not isinstance(value, str | Path) or value in orders:
        return value
    path = expand_user(value)
    where, what = f"{where}: {value}", "one class name per line, or a JSON list"
    problem = "cannot read the class names" if path.is_file() else "no such file of class names"
    expected = ", ".join([*orders, f"a UTF-8 file with {what}"])
    try:
        text = read_text(path, problem, limit=MAX_NAMES_BYTES, expected=expected)
    except RecipeError as error:
        raise RecipeError(problem, where=where, expected=error.expected, found=error.found) from error
    if path.suffix == ".json":
        return _names_in_json(text, where)
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not lines or "" in lines:
        found = f"line {lines.index('') + 1} is empty" if lines else "an empty file"
        raise RecipeError("cannot read the class names", where=where, expected=what, found=found)
    return lines


def names_in(value: Any) -> Names | None:
    """Class names as libraries store them, in the order of the outputs; None if `value` is something else.

    These are a list of names, name → number (`class_to_idx`, `label2id`), and number → name (`id2label`). Numbers must
    be 0 to C − 1.
    """
    if isinstance(value, Mapping):
        value = _in_order(value)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) for name in value):
        return None
    return tuple(value)


def arrange(names: Names, order: str | Names, *, complete: bool = True) -> Names:
    """Class names in an order: a key of `ORDERS`, or a list of them.

    Args:
        complete: whether the list must name exactly these classes. Otherwise it may have others, and classes that it
            lacks come last.

    Raises:
        DataError: a list without one of the classes, with others, or with a name twice.
    """
    if isinstance(order, str):
        return ORDERS[order](names)
    given, lacking = set(order), [name for name in names if name not in set(order)]
    if complete and (lacking or len(order) != len(names)):
        twice = [name for name, count in Counter(order).items() if count > 1]
        unknown = sorted(given.difference(names))
        problems = {"twice": twice, "not listed": lacking, "without a folder": unknown}
        raise DataError(
            "dataset.class_order does not list the classes of the dataset",
            where="dataset.class_order",
            expected=f"each of {describe(names)} once",
            found="; ".join(f"{what}: {listed(some)}" for what, some in problems.items() if some),
        )
    return (*(name for name in dict.fromkeys(order) if name in set(names)), *lacking)


def describe(names: Sequence[str]) -> str:
    """Class names for a message, the first few of many."""
    return f"{len(names)} class{'' if len(names) == 1 else 'es'}: {listed(names)}"


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first few of many."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def has_control_character(name: str) -> bool:
    """Whether a name has a control character or a line break, which a terminal would obey."""
    return any(unicodedata.category(character) in {"Cc", "Zl", "Zp"} for character in name)


def names_that_look_the_same(names: Sequence[str]) -> tuple[str, str] | None:
    """The first two names that differ in spaces or Unicode forms only; None if there are none."""
    plain: dict[str, str] = {}
    for name in names:
        same = plain.setdefault(" ".join(unicodedata.normalize("NFC", name).split()), name)
        if same != name:
            return same, name
    return None


def _names_in_json(text: str, where: str) -> Names:
    names = names_in(parse_json(text, "no class names in the JSON file", where=where))
    if names is None or any(unprintable(name) for name in names):
        raise RecipeError("no class names in the JSON file", where=where, expected="a list of names, or name: number")
    return names


def _in_order(mapping: Mapping[Any, Any]) -> list[Any] | None:
    """The names of a mapping between names and numbers, by number; None if the numbers are not 0 to C − 1."""
    if not all(isinstance(name, str | int) for name in mapping):
        return None
    if all(_is_number(number) for number in mapping.values()):
        pairs = {number: str(name) for name, number in mapping.items()}
    elif all(_is_number(number) or (isinstance(number, str) and number.isdecimal()) for number in mapping):
        pairs = {int(number): _word(name) for number, name in mapping.items()}
    else:
        return None
    return [pairs[number] for number in range(len(mapping))] if pairs.keys() == set(range(len(mapping))) else None


def _word(name: Any) -> Any:
    """A name of number → name; the first of the pair in Keras' `imagenet_class_index.json`, which is the WordNet id."""
    return name[0] if isinstance(name, list | tuple) and len(name) == 2 else name


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
