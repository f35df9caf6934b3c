"""Python processes that need not import torch and our packages, which takes seconds of processor time.

They are forked from a process that has imported these and done nothing else: nothing in them has used torch or polars.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
# One list for all processes: the first of them starts the server, with the list of that moment.
CONTEXT.set_forkserver_preload([
    "hypothesis",
    "pytest",
    "timm",
    "torch._dynamo",
    "open_clip",
    "pipeline.build.blocks",
    "pipeline.build.cache",
    "pipeline.build.open_output",
    "train.run",
    "tests.support.tiny_build",
    "tests.support.tiny_run",
])  # fmt: skip


class Preloaded:
    """A process that runs a function, with some of what `subprocess.Popen` has."""

    returncode: int | None = None

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        files = [Path(self._folder.name) / name for name in ("out", "err")]
        surroundings = (files, cwd or Path.cwd(), {**os.environ, **(variables or {})})
        self._process = CONTEXT.Process(target=_run, args=(surroundings, function, arguments))
        self._files = files
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; what it has written to standard output and to standard error."""
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            self._process.kill()
            self._process.join()
        out, err = (file.read_text(errors="replace") if file.exists() else "" for file in self._files)
        self._folder.cleanup()
        assert code is not None, f"it takes more than {timeout} s\n{(out + err)[-6000:]}"
        self.returncode = code
        return out, err


def run_script(script: Path, *options: str) -> None:
    """What `python SCRIPT OPTIONS` does."""
    sys.argv = [str(script), *options]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def run_module(module: str, *options: str) -> None:
    """What `python -m MODULE OPTIONS` does."""
    sys.argv = [module, *options]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_main(module: str, *options: str) -> None:
    """What the command with the function `main` of a module does."""
    sys.argv = [module, *options]
    importlib.import_module(module).main()


def run_tests(*options: str) -> None:
    """What `pytest OPTIONS` does."""
    # pytest rewrites the assertions of plugins such as zarr's, unless these are imported already.
    sys.exit(int(pytest.main(["-W", "ignore:Module already imported", *options])))


def _run(surroundings: tuple[list[Path], Path, dict[str, str]], function: Callable[..., Any], arguments: Any) -> None:
    files, folder, variables = surroundings
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    function(*arguments)
