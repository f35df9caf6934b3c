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


def run(module: str) -> None:
    """Call `main` of a module of ours."""
    importlib.import_module(module).main()
