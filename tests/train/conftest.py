"""Tiny trainings take shortcuts; `runs/test_curves.py` and `test_cost.py` test the functions that they skip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import train.run.state
from tests.support import tiny_run
from tests.support.shortcuts import take_shortcuts
from train.runs.curves import plot_curves


@pytest.fixture(scope="session", autouse=True)
def shortcuts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        take_shortcuts(patch)
        yield


@pytest.fixture
def real_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test draw their curves."""
    monkeypatch.setattr(train.run.state, "plot_curves", plot_curves)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return tiny_run.write_cache(tmp_path_factory.mktemp("cache") / "tiny.zarr", pictures)
