"""The wheel, installed alone in an environment of its own, does the main job away from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `make dist` has built, or one built now."""
    if built := os.environ.get("WHEEL"):
        return Path(built)
    folder = tmp_path_factory.mktemp("dist")
    command: list[str | Path] = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; the dependencies are those that run this test.

    Python appends the folders that a .pth file lists, but does not read the .pth files in these. So an editable
    installation of the checkout, which is such a file, is not found.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin/pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.mark.slow
def test_wheel_builds_a_cache_and_trains_a_student(environment: Path, tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["TEACHER_CACHE_HOME"] = str(tmp_path / "caches")

    def run(command: str, *arguments: str) -> str:
        words: list[str | Path] = [environment / "bin" / command, *arguments]
        return subprocess.run(words, check=True, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, text=True).stdout

    packages = "cache_tools, train, pipeline, teacher_cache"
    where = f"import {packages}; print(*(module.__file__ for module in ({packages})))"
    for file in run("python", "-c", where).split():
        assert Path(file).is_relative_to(environment)

    settings = ("--set", "num_views=2", "--set", "preflight_samples=64", "--set", "device=cpu")
    run("build-cache", *settings)
    (listed,) = json.loads(run("cache-tools", "ls", "--json"))
    assert listed["name"] == "digits"
    result = json.loads(run("train-student", "--epochs", "1", "--out", "run", "--json"))
    assert result["fingerprint"] == listed["fingerprint"]
    assert result["last"]["n"] == 359
    assert (tmp_path / "run/report.html").stat().st_size > 10_000
