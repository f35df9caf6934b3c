"""Tests that repeat something many times have a short turn, in `make test`, and a long one, in `make test-slow`."""

from __future__ import annotations

import os

LONG = os.environ.get("TEACHER_CACHE_LONG_TESTS", "0") != "0"


def turns(short: int, long: int) -> int:
    """How many times to repeat."""
    return long if LONG else short
