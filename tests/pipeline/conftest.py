"""Tiny builds and trainings take shortcuts; plans time each thing for a moment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline import plan
from tests.support.shortcuts import share_tokenizer, take_shortcuts


@pytest.fixture(scope="package", autouse=True)
def shortcuts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        take_shortcuts(patch)
        share_tokenizer(patch)
        patch.setattr(plan, "BUDGET_S", 0.05)
        yield
