"""Commands under torchrun, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.preloaded import Preloaded

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300.0
PROGRAM = "import torch; torch.set_num_threads(1); from {module} import main; main()"
TORCHRUN = ("-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")


@contextmanager
def started(module: str, *arguments: object, count: int = 2, restarts: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A command on several ranks."""
    words = [sys.executable, *TORCHRUN, "--nproc-per-node", count, "--max-restarts", restarts, "--no-python", "--"]
    words += [sys.executable, "-c", PROGRAM.format(module=module), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(list(map(str, words)), env=environment, start_new_session=True, **pipes)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(module: str, *arguments: object, count: int = 2) -> tuple[int, str, str]:
    """The exit code of torchrun, and what was printed; torchrun and its ranks are forked (`preloaded`)."""
    process = Preloaded(_torchrun, module, count, list(map(str, arguments)), variables={"OMP_NUM_THREADS": "1"})
    out, err = process.communicate(PATIENCE_S)
    assert process.returncode is not None
    return process.returncode, out, err


def _torchrun(module: str, count: int, arguments: list[str]) -> None:
    from torch.distributed.run import main

    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program.py")
        program.write_text(PROGRAM.format(module=module))
        forked = ("--start-method=fork", "--run-path", str(program))
        main([*TORCHRUN[2:], f"--nproc-per-node={count}", *forked, *arguments])


def rank_of(number: int, torchrun: int) -> int | None:
    """The process of a rank; None before it runs."""
    for folder in Path("/proc").iterdir():
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1] if folder.name.isdigit() else None
            is_ours = parent == str(torchrun)
            if is_ours and f"RANK={number}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue
    return None
