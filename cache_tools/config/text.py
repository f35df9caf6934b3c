"""Text that users and strangers hand over: files, YAML and JSON, with limits on their size before they are parsed.

Every reader here takes any bytes, and either gives plain data of a bounded size or raises one clear error.
"""

from __future__ import annotations

import json
import os
import re
import stat
from functools import cache
from pathlib import Path
from typing import Any

from cache_tools.errors import CacheError, RecipeError

MAX_RECIPE_BYTES = 1 << 20
MAX_TEXT_BYTES = 64 << 20
MAX_NODES, MAX_DEPTH = 100_000, 64  # of YAML and JSON, with aliases written out
MAX_DIGITS = 1000  # of a number; the time to read 59:59:59:… grows with its square

# All but tab and line breaks; and the two separators at which `splitlines` cuts, though no editor does.
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029]")
# safe_load raises its own error for bad grammar, and others for a date such as 2020-13-45, a number without digits
# (0b_) or with thousands of them, a value that contradicts its tag (!!bool 7), and lists nested without end.
_PARSE_ERRORS = (ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def read_bytes(path: Path, what: str, *, limit: int, error: type[CacheError] = RecipeError, expected: str) -> bytes:
    """The content of a file that a user has named.

    Args:
        what: the message if it cannot be read, such as `cannot read the class names`.
        limit: the largest size in bytes.
        error: the class of the error.
        expected: what the file should be, for messages.

    Raises:
        CacheError: no such file, no permission, a pipe or device (which is not read), or too many bytes.
    """
    try:
        # A pipe without a writer would block here for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as problem:
        found = "no such file" if isinstance(problem, FileNotFoundError) else _reason(problem)
        raise error(what, where=path, expected=expected, found=found) from problem
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, device or socket"
        raise error(what, where=path, expected=expected, found=kind)
    with os.fdopen(descriptor, "rb") as file:
        try:
            content = file.read(limit + 1)
        except OSError as problem:
            raise error(what, where=path, expected=expected, found=_reason(problem)) from problem
    if len(content) > limit:
        size = max(status.st_size, len(content))
        raise error(what, where=path, expected=f"{expected} of at most {limit:,} bytes", found=f"{size:,} bytes")
    return content


def read_text(
    path: Path,
    what: str,
    *,
    limit: int = MAX_TEXT_BYTES,
    error: type[CacheError] = RecipeError,
    expected: str = "a UTF-8 text file",
) -> str:
    """The text of a file that a user has named, without a byte-order mark; arguments as `read_bytes`.

    Raises:
        CacheError: as `read_bytes`; bytes that are not UTF-8, or control characters.
    """
    content = read_bytes(path, what, limit=limit, error=error, expected=expected)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        found = "UTF-16 text" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else f"other bytes in line {line}"
        raise error(what, where=path, expected=expected, found=found) from problem
    if control := _CONTROL.search(text):
        line = text.count("\n", 0, control.start()) + 1
        found = f"the control character {control[0]!a} in line {line}"
        raise error(what, where=path, expected=expected, found=found)
    return text


def parse_yaml(text: str, what: str, *, where: object) -> Any:
    """Parse YAML into plain data. A key that is there twice is an error.

    Args:
        what: the message for text that cannot be parsed.

    Raises:
        RecipeError: the text is not YAML, or larger than a recipe can be; Python cannot hold or print a value.
    """
    import yaml

    if len(text) > MAX_RECIPE_BYTES:
        found = f"{len(text):,}"
        raise RecipeError(what, where=where, expected=f"at most {MAX_RECIPE_BYTES:,} characters", found=found)
    try:
        loader = _bounded_loader()(text)
        try:
            data = loader.get_single_data()
        finally:
            loader.dispose()
        repr(data)  # fails for a number of thousands of hexadecimal digits, which no error message could print
        return data
    except (yaml.YAMLError, *_PARSE_ERRORS) as error:
        raise RecipeError(what, where=where, expected="YAML", found=str(error)) from error


def parse_json(text: str | bytes, what: str, *, where: object, error: type[CacheError] = RecipeError) -> Any:
    """Parse JSON into plain data. A key that is there twice, NaN and infinity are errors.

    Args:
        what: the message for text that cannot be parsed.
        error: the class of the error.

    Raises:
        CacheError: the text is not JSON, or nests too deeply.
    """
    try:
        data = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
        _check_depth(data)
        return data
    except (ValueError, RecursionError) as problem:
        raise error(what, where=where, expected="JSON", found=_reason(problem)) from problem


@cache
def _bounded_loader() -> Any:
    """yaml.SafeLoader with limits that hold before values are made, and without keys that are there twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def __init__(self, stream: Any) -> None:
            super().__init__(stream)
            self.totals = [0]  # nodes in each of the open collections
            self.sizes: dict[int, int] = {}  # of finished nodes, with aliases written out

        def compose_node(self, parent: Any, index: Any) -> Any:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            alias = self.check_event(yaml.AliasEvent)
            if not alias:
                self.totals.append(1)
                if len(self.totals) > MAX_DEPTH + 1:
                    raise yaml.MarkedYAMLError(problem=f"more than {MAX_DEPTH} levels of nesting", problem_mark=mark)
            node: Any = super().compose_node(parent, index)
            if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
                raise yaml.MarkedYAMLError(problem=f"a number of more than {MAX_DIGITS:,} digits", problem_mark=mark)
            if not alias:
                self.sizes[id(node)] = self.totals.pop()
            elif id(node) not in self.sizes:
                raise yaml.MarkedYAMLError(problem="a value that contains itself", problem_mark=mark)
            self.totals[-1] += self.sizes[id(node)]
            if self.totals[-1] > MAX_NODES:
                raise yaml.MarkedYAMLError(problem=f"more than {MAX_NODES:,} values", problem_mark=mark)
            return node

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in seen:
                        raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' twice", problem_mark=key.start_mark)
                    seen.add((key.tag, key.value))
            return node

    return Loader


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} twice")
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name}, which is no JSON")


def _check_depth(data: Any) -> None:
    """Raise ValueError for data that is nested too deeply for those who walk through it."""
    level, depth = [data], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels of nesting")
        inner = [value for value in level if isinstance(value, dict | list)]
        level = [part for value in inner for part in (value.values() if isinstance(value, dict) else value)]


def _reason(problem: BaseException) -> str:
    text = getattr(problem, "strerror", None) or str(problem)
    return (text.splitlines() or [type(problem).__name__])[0]
