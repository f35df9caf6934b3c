"""Checkpoints in every wrapping give the right weights, bit for bit, or are refused with a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.wrappings import Wrapping, fault, wrappings

WRAPPINGS = wrappings()


@pytest.mark.parametrize("wrapping", WRAPPINGS, ids=[wrapping.title for wrapping in WRAPPINGS])
def test_it_gives_the_right_weights_or_is_refused(tmp_path: Path, wrapping: Wrapping) -> None:
    _, wrong = fault(wrapping, tmp_path)
    assert wrong is None, wrong
