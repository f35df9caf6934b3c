from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.preloaded import Preloaded

ROOT = Path(__file__).parents[2]
Python = Callable[..., "subprocess.CompletedProcess[str]"]


# What the process of `forked_python` keeps: not our packages, and nothing of the tests that imports them.
OURS = ("cache_tools", "pipeline", "teacher_cache", "tests", "train")


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


@pytest.fixture
def forked_python(project: Path) -> Python:
    """As `python -c`, in a process that has imported torch and other libraries (`preloaded`), but nothing of ours."""

    def run(code: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        process = Preloaded(_run_code, code, cwd=project, variables={"PYTHONPATH": os.pathsep.join([".", str(ROOT)])})
        out, err = process.communicate(timeout=300)
        assert process.returncode is not None
        assert not check or process.returncode == 0, err
        return subprocess.CompletedProcess(code, process.returncode, out, err)

    return run


def _run_code(code: str) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in OURS:
            del sys.modules[name]
    own = {"", str(ROOT), *map(str, (Path.cwd(), Path(sys.argv[0]).parent))}
    sys.path[:] = ["", str(Path.cwd()), str(ROOT), *(folder for folder in sys.path if folder not in own)]
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__.partition(".")[0] not in OURS]
    sys.argv = ["-c"]
    sys.path_importer_cache.clear()
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
