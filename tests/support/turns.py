"""Short and long turns: what `make test` repeats a few times, and `make test-slow` many times."""

from __future__ import annotations

import os
from typing import Any

import pytest

LONG = os.environ.get("TEACHER_CACHE_LONG_TESTS", "0") != "0"


def turns(short: int, long: int) -> int:
    """How often to repeat; mark the test `turns`, so that `make test-slow` runs it again."""
    return long if LONG else short


def slow(*values: Any) -> Any:
    """Parameters of a test that only `make test-slow` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)
