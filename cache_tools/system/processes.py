"""Start Python processes that import our packages, whatever lies in their working folder or on PYTHONPATH.

They import `teacher_cache.commands` first. It is named only in strings here, because it lies above this package.
"""

from __future__ import annotations

import sys
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

CLAIM = "teacher_cache.commands"


def command_for(module: str) -> list[str]:
    """The command that runs `main` of a module of ours in a new interpreter."""
    return [sys.executable, "-c", code_for(module)]


def code_for(module: str) -> str:
    """The program that calls `main` of a module of ours."""
    root = str(Path(__file__).parents[2])
    return f"import sys; sys.path.append({root!r}); from {CLAIM} import run; run({module!r})"


def process_pool(count: int) -> ProcessPoolExecutor:
    """A pool of fresh (spawned) processes."""
    from concurrent.futures import ProcessPoolExecutor

    return ProcessPoolExecutor(count, get_context("spawn"), initializer=import_module, initargs=(CLAIM,))
