"""Processes of a sweep: what they print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cache_tools.errors import CacheError
from tests.support import tiny_run
from train.runs.result import load_result
from train.sweep.recipe import SweepRecipe, make_trials
from train.sweep.workers import ProcessEngine, visible_gpus

pytestmark = pytest.mark.medium

NOISY = """
import logging, os, warnings
from torch import nn

def student(num_classes):
    warnings.warn("a library warns")
    logging.getLogger("timm").warning("timm warns")
    logging.getLogger("timm").error("timm has an error on GPU " + os.environ["CUDA_VISIBLE_DEVICES"])
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
    ProcessEngine(1, tmp_path, ["GPU-7"])([[trial]], None)
    result = load_result(trial.folder)
    assert result is not None
    log = (tmp_path / "workers.log").read_text()
    assert f"{result.pixels}\n" in log
    assert "timm has an error on GPU GPU-7" in log
    assert "a library warns" not in log
    assert "timm warns" not in log


def test_missing_images_are_an_error_before_a_process_starts(cache: Path, tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    base = tiny_run.recipe(cache, Path("unused"), epochs=1, data_dir=lost).model_dump(mode="json")
    trials = make_trials(SweepRecipe(name="tiny", base=base), tmp_path)
    with pytest.raises(CacheError, match=str(lost)):
        ProcessEngine(1, tmp_path)([trials], None)
    assert not (tmp_path / "workers.log").exists()


class _Process:
    returncode: int | None = None


def test_each_process_takes_the_gpu_with_the_fewest(tmp_path: Path) -> None:
    engine, running = ProcessEngine(5, tmp_path, ["0", "1"]), list[Any]()
    for expected in ("0", "1", "0", "1"):
        assert engine._free_gpu() == expected
        running.append(_Process())
        engine._gpu_of[running[-1]] = expected
    running[1].returncode = 0
    assert engine._free_gpu() == "1"
    assert ProcessEngine(5, tmp_path)._free_gpu() is None


def test_the_gpus_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(cuda, "auto") == ["0", "1"]
    assert visible_gpus(torch.device("cuda:1"), "cuda:1") == []
    assert visible_gpus(cpu, "auto") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    assert visible_gpus(cuda, "cuda") == ["GPU-a", "GPU-b"]
