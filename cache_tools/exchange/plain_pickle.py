"""Plain data out of a pickle: numbers, text, lists, tuples and dicts, and nothing else.

The bytes must follow a grammar of opcodes that only make such data. It has no opcode that names a class or a function,
calls one, or sets its state, so nothing in a file can run; and none that asks for more memory than the file is long.
"""

from __future__ import annotations

import io
import pickle
import re
from typing import Any, NoReturn

_MAX_TEXT = 255
_TEXTS = (
    b"|".join(rb"\x8c" + re.escape(bytes([length])) + b".{%d}" % length for length in range(_MAX_TEXT + 1))
    + b"|"
    + b"|".join(
        rb"X" + re.escape(bytes([length])) + rb"\x00\x00\x00" + b".{%d}" % length for length in range(_MAX_TEXT + 1)
    )
)
_LONGS = b"|".join(rb"\x8a" + re.escape(bytes([length])) + b".{%d}" % length for length in range(9))
# Marks, empty and filled containers, None and booleans; numbers; the memo, of few entries; protocol and frames; text.
_GRAMMAR = re.compile(
    rb"(?s)(?:[()\]}Naelstud012\x85-\x89\x94]|G.{8}|K.|M..|J.{4}|[hq].|[rj]..[\x00-\x0f]\x00|\x80.|\x95.{8}|"
    + _LONGS
    + b"|"
    + _TEXTS
    + rb")*+\."
)


class PlainDataError(ValueError):
    """The bytes are no pickle of plain data."""


def plain_data(data: bytes) -> Any:
    """The data that the bytes hold; PlainDataError if they hold anything but plain data."""
    if _GRAMMAR.fullmatch(data) is None:
        raise PlainDataError("objects other than numbers, text, lists, tuples and dicts")
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # such as a stack that is empty
        raise PlainDataError("damaged data") from error


class _PlainUnpickler(pickle.Unpickler):
    """Knows no name at all; the grammar has none either."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise PlainDataError(f"the name {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise PlainDataError("a reference to something outside")
