import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.plan import Plan

pytestmark = pytest.mark.medium


def make(**changes: Any) -> Plan:
    """50 000 images × 16 views, teachers at 1000 images/s, a student of 240 epochs at 2000."""
    figures: dict[str, Any] = {
        "device": "cpu",
        "samples": 50_000,
        "views": 16,
        "bytes": 10**9,
        "bytes_free": 10**11,
        "targets_per_s": 1000.0,
        "student": "resnet8x4",
        "student_per_s": 2000.0,
        "epochs": 240,
        "build_s": 800.0,
        "speedup": 3.0,
        "epochs_to_break_even": 16,
        "students_to_break_even": 16 / 240,
    }
    return Plan.model_validate(figures | changes)


def test_a_long_run_pays_for_its_cache() -> None:
    # Live teachers cost 240 epochs × 50 s; the cache 800 s. 12 000 − 800 s = 187 min saved, then 200 min each.
    verdict = make().verdict
    assert "after 16 epochs of training, within the first student of 240 epochs" in verdict
    assert "saves 3 h 07 min there, and 3 h 20 min for every further one" in verdict


def test_a_short_run_does_not() -> None:
    verdict = make(epochs=5, students_to_break_even=3.2).verdict
    assert "that is 4 students of 5 epochs. For a single student, train with live teachers" in verdict
    assert "at most 5 --views" in verdict


def test_cheap_teachers_save_little() -> None:
    assert "saves little: most of the time goes into the student" in make(speedup=1.02).verdict


def test_a_full_disk_comes_first() -> None:
    assert make(bytes=10**12).verdict.startswith("The disk is too small")


def test_the_command_measures_and_builds_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"TEACHER_CACHE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipeline.cli", "digits", "--plan", "--plan-student", "resnet8", "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert not (tmp_path / "home").exists()
    assert plan["samples"] == 1438
    # float16 logits of 10 classes and 64 features, keys, labels, constants
    assert plan["bytes"] == pytest.approx(8 * 1438 * 2 * (10 + 64), rel=0.1)
    assert plan["build_s"] == pytest.approx(8 * 1438 / plan["targets_per_s"])
    assert plan["speedup"] == pytest.approx(1 + plan["student_per_s"] / plan["targets_per_s"])
    assert 10 < plan["student_per_s"] < 10**6
