"""Tiny builds and trainings take shortcuts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.shortcuts import share_tokenizer, take_shortcuts


@pytest.fixture(scope="package", autouse=True)
def shortcuts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        take_shortcuts(patch)
        share_tokenizer(patch)
        yield
