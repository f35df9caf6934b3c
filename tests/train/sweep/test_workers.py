"""Processes of a sweep: what they print."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import tiny_run
from train.runs.result import load_result
from train.sweep.recipe import SweepRecipe, make_trials
from train.sweep.workers import ProcessEngine

pytestmark = pytest.mark.medium

NOISY = """
import logging, warnings
from torch import nn

def student(num_classes):
    warnings.warn("a library warns")
    logging.getLogger("timm").warning("timm warns")
    logging.getLogger("timm").error("timm has an error")
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


def test_warnings_of_libraries_are_not_in_the_log(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noisy_nets.py").write_text(NOISY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("TEACHER_CACHE_WARNINGS", raising=False)
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    base = tiny_run.recipe(cache, Path("unused"), epochs=1).model_dump(mode="json")
    sweep = SweepRecipe(name="tiny", base=base, students=("noisy_nets:student",))
    (trial,) = make_trials(sweep, tmp_path)
    ProcessEngine(1, tmp_path)([[trial]], None)
    result = load_result(trial.folder)
    assert result is not None
    log = (tmp_path / "workers.log").read_text()
    assert f"{result.pixels}\n" in log
    assert "timm has an error" in log
    assert "a library warns" not in log
    assert "timm warns" not in log
