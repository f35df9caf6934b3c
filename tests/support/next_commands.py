"""The commands that our commands print: they are parsed as a shell and the command itself would, but not run."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Iterable
from typing import Any

import typer

_MODULES = {
    "build-cache": "pipeline.cli",
    "train-student": "train.cli",
    "sweep-students": "train.sweep.cli",
    "evaluate-student": "pipeline.evaluate.cli",
    "export-student": "train.export.cli",
    "report-students": "train.report.cli",
    "cache-tools": "cache_tools.cli",
}


def commands_in(text: str) -> list[list[str]]:
    """The words of every command in a printed text: lines `next: COMMAND`, and indented lines that are one."""
    lines = [line.strip().removeprefix("next: ") for line in text.splitlines()]
    found = [shlex.split(line) for line in lines if line.partition(" ")[0] in _MODULES]
    for words in found:
        parse(words)
    return found


def parse(words: Iterable[str]) -> dict[str, Any]:
    """The options of a command. Raises what the command would for words that it does not take."""
    program, *rest = words
    command: Any = typer.main.get_command(importlib.import_module(_MODULES[program]).app)
    if program == "cache-tools":
        command = command.commands[rest.pop(0)]
    return command.make_context(program, rest).params
