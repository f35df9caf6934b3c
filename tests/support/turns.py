"""Short and long turns: what `make test` repeats a few times, and `make test-slow` many times."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest

LONG = os.environ.get("TEACHER_CACHE_LONG_TESTS", "0") != "0"


def turns(short: int, long: int) -> int:
    """How often to repeat; mark the test `turns`, so that `make test-slow` runs it again."""
    return long if LONG else short


def slow(*values: Any) -> Any:
    """Parameters of a test that only `make test-slow` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def some(values: Iterable[Any], keep: int) -> list[Any]:
    """Parameters of a test: `make test` runs it with the first `keep` of them, `make test-slow` with the rest."""
    chosen = list(values)
    return [*chosen[:keep], *(slow(*each) if isinstance(each, tuple) else slow(each) for each in chosen[keep:])]
