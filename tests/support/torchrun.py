"""Commands under torchrun, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300.0
TORCHRUN = ("-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")


@contextmanager
def started(module: str, *arguments: object, count: int = 2, restarts: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A command on several ranks."""
    program = f"import torch; torch.set_num_threads(1); from {module} import main; main()"
    words = [sys.executable, *TORCHRUN, "--nproc-per-node", count, "--max-restarts", restarts, "--no-python", "--"]
    words += [sys.executable, "-c", program, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(list(map(str, words)), env=environment, start_new_session=True, **pipes)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(module: str, *arguments: object, count: int = 2, restarts: int = 0) -> tuple[int, str, str]:
    """The exit code of torchrun, and what was printed."""
    with started(module, *arguments, count=count, restarts=restarts) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
        return process.returncode, out, err


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
