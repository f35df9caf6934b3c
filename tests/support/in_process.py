"""Run commands in this process, through the entry points that users have, without a new interpreter for each."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

MODULES = {
    "build-cache": "pipeline.cli",
    "train-student": "train.cli",
    "sweep-students": "train.sweep.cli",
    "evaluate-student": "pipeline.evaluate.cli",
    "export-student": "train.export.cli",
    "report-students": "train.report.cli",
    "cache-tools": "cache_tools.cli",
}


def invoke(command: str, *words: object) -> Any:
    """The result of a command: `exit_code`, `stdout`, `stderr`. An exception that is no exit is raised: it is a bug."""
    app = importlib.import_module(MODULES[command]).app
    arguments = [str(word) for word in words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command, *arguments])
        result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
