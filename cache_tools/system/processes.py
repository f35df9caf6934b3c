"""Start Python processes that import our packages, whatever lies in their folder, and that end with their parent.

They import `teacher_cache.commands` first. It is named only in strings here, because it lies above this package.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

CLAIM = "teacher_cache.commands"
LOOK_EVERY_S, GRACE_S = 0.5, 10.0
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def command_for(module: str) -> list[str]:
    """The command that runs `main` of a module of ours in a new interpreter, which ends with this process."""
    return [sys.executable, "-c", code_for(module)]


def code_for(module: str) -> str:
    """The program that calls `main` of a module of ours, and ends with this process."""
    root = str(Path(__file__).parents[2])
    return f"import sys; sys.path.append({root!r}); from {CLAIM} import run; run({module!r}, parent={os.getpid()})"


def process_pool(count: int) -> ProcessPoolExecutor:
    """A pool of fresh (spawned) processes, which end with this one, and with the thread that starts them."""
    from concurrent.futures import ProcessPoolExecutor

    start = import_module(CLAIM).start_worker
    return ProcessPoolExecutor(count, get_context("spawn"), initializer=start, initargs=(os.getpid(),))


def end_with_parent(parent: int, *, grace_s: float = GRACE_S) -> None:
    """End this process when its parent has ended, in whatever way: a SIGKILL of the parent cannot be handled there.

    The system sends SIGTERM at once where it can (Linux). A thread looks at the parent too, for other systems, for a
    parent that ended before this call, and for a process that does not react to SIGTERM.

    Args:
        parent: the id of the process that started this one.
        grace_s: time to clean up before SIGKILL.
    """
    if sys.platform == "win32":  # a launcher may be between the two, and there is no SIGTERM to handle
        return
    if sys.platform == "linux":
        import ctypes

        with suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    threading.Thread(target=_watch, args=(parent, grace_s), name="parent", daemon=True).start()


def _watch(parent: int, grace_s: float) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)
