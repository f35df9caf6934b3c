"""The commands. Whatever lies in the working folder or on PYTHONPATH, they import the packages of teacher-cache.

Importing this module claims the names of our packages for the whole process. Processes that a command starts import it
first (`cache_tools.system.processes`).
"""

from __future__ import annotations

import importlib

from teacher_cache.packages import claim

claim("pipeline", evict=True)


def build_cache() -> None:
    run("pipeline.cli")


def train_student() -> None:
    run("train.cli")


def sweep_students() -> None:
    run("train.sweep.cli")


def evaluate_student() -> None:
    run("pipeline.evaluate.cli")


def report_students() -> None:
    run("train.report.cli")


def export_student() -> None:
    run("train.export.cli")


def cache_tools() -> None:
    run("cache_tools.cli")


def run(module: str, parent: int | None = None) -> None:
    """Call `main` of a module of ours, with output that cannot affect a terminal.

    Args:
        parent: the process that started this one, which ends with it; None for a command of the user.
    """
    from cache_tools.console import escape_output

    escape_output()
    if parent is not None:
        from cache_tools.system.processes import end_with_parent

        end_with_parent(parent)
    importlib.import_module(module).main()


def start_worker(parent: int) -> None:
    """Begin a process of a pool. It ends with its parent, which alone reacts to Ctrl-C."""
    import signal

    from cache_tools.console import escape_output
    from cache_tools.system.processes import end_with_parent

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    escape_output()
    end_with_parent(parent)
