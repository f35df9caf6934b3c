"""Run a function in a forked process: get its result, or kill it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Child:
    """A forked process that runs `function`; its JSON result, or its traceback, comes through a pipe."""

    def __init__(self, function: Callable[[], Any], log: Path | None = None) -> None:
        self._out, into = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._out)
            code = 1
            try:
                if log is not None:
                    _redirect(log)
                answer = json.dumps({"result": _plain(function())})
                code = 0
            except SystemExit as leaving:
                answer = json.dumps({"exit": leaving.code})
            except BaseException:
                answer = json.dumps({"error": traceback.format_exc()})
            os.write(into, answer.encode())
            os._exit(code)
        os.close(into)

    def kill(self) -> bool:
        """Whether it was still running."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait() is None

    def wait(self) -> dict[str, Any] | None:
        """Its answer as a dict with "result", "exit" or "error"; None if it was killed."""
        with os.fdopen(self._out, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        return None if os.WIFSIGNALED(status) else json.loads(answer)


def in_child(function: Callable[[], Any], log: Path | None = None) -> Any:
    """The result of `function`, run in a process of its own; what it prints goes to `log`."""
    answer = Child(function, log).wait()
    assert answer is not None, "a child was killed"
    if "result" not in answer:
        raise RuntimeError(answer.get("error") or f"exit code {answer['exit']}")
    return answer["result"]


def _plain(value: Any) -> Any:
    return vars(value) if dataclasses.is_dataclass(value) else value


def _redirect(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
