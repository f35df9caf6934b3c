"""Shortcuts for tiny trainings. Each of the two real things takes longer than training a tiny student."""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import train.run
import train.sweep.run
from train.cost import measure
from train.runs.curves import plot_curves

DOT = base64.b64decode(  # the smallest PNG
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="session", autouse=True)
def shortcuts() -> Iterator[None]:
    """Runs draw a dot as their curves, and sweeps time each student a few times instead of for two seconds.

    `train/runs/test_curves.py` and `train/test_cost.py` test the real functions; `real_curves` brings the curves back.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.run, "plot_curves", _draw_a_dot)
        patch.setattr(train.sweep.run, "measure", functools.partial(measure, budget_s=0.0))
        yield


@pytest.fixture
def real_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test draw their curves."""
    monkeypatch.setattr(train.run, "plot_curves", plot_curves)


def _draw_a_dot(history: object, path: Path, *_: object) -> None:
    path.write_bytes(DOT)
