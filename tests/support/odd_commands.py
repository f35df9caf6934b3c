"""Commands with odd arguments, in this process: whether they end with a documented code and a message for people."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import typer
from typer.testing import CliRunner

from tests.support.in_process import MODULES

TIME_S = 300


class Ended(NamedTuple):
    """How a command ended; `problem` is None for a documented exit code and a message of lines for people."""

    code: int
    output: str
    problem: str | None


def app_of(command: str) -> typer.Typer:
    app: typer.Typer = import_module(MODULES[command]).app
    return app


def run(command: str, arguments: Sequence[str], codes: Sequence[int] = (0, 1, 2)) -> Ended:
    """Run a command in this process."""
    try:
        with _alarm():
            result = CliRunner().invoke(app_of(command), list(arguments))
    except TimeoutError:
        return Ended(-1, "", f"it takes more than {TIME_S} s")
    problem = None
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        place = result.exception.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = "" if place is None else f" in {place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
        problem = f"{type(result.exception).__name__}: {str(result.exception)[:300]}{where}"
    elif result.exit_code not in codes:
        problem = f"exit code {result.exit_code}"
    elif "Traceback" in result.output:
        problem = "a traceback"
    elif result.exit_code == 2 and not result.output.strip():
        problem = "no message"
    return Ended(result.exit_code, result.output, problem)


@contextmanager
def _alarm() -> Iterator[None]:
    def expire(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    remaining = signal.alarm(TIME_S)
    try:
        yield
    finally:
        signal.alarm(remaining)
        signal.signal(signal.SIGALRM, before)


def names_below(*folders: Path, leave_out: Path | None = None) -> set[str]:
    """The names of all files and folders below some folders, two levels deep."""
    found = set()
    for folder in folders:
        for root, inner, files in os.walk(folder):
            if Path(root) == leave_out or len(Path(root).relative_to(folder).parts) >= 2:
                inner.clear()
                continue
            found |= {os.path.join(root, name) for name in (*inner, *files)}
    return found
