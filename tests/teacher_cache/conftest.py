from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder with modules that have the names of our packages."""
    folder = tmp_path / "project"
    (folder / "pipeline").mkdir(parents=True)
    (folder / "train.py").write_text("owner = 'user'\n")
    (folder / "pipeline/__init__.py").write_text("owner = 'user'\n")
    (folder / "cache_tools.py").write_text("owner = 'user'\n")
    return folder


@pytest.fixture
def python(project: Path) -> Python:
    """Run Python in the project with PYTHONPATH=.; our packages come after it, as in an installation."""

    def run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", str(ROOT)])}
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run
