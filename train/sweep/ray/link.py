"""The line to the process that talks to Ray (`ray_driver`): JSON there, JSON back, and what its silence means."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from cache_tools.errors import StorageError
from train.sweep.ray.driver import QUIET
from train.sweep.ray.worker import from_data

POLL_S, GOODBYE_S = 1.0, 20.0
_DRIVER = "from train.sweep.ray.driver import main; main()"


class Driver:
    """A process of `ray_driver.main`.

    Args:
        log: file for what it and Ray print.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._process = self._start()

    def tell(self, message: dict[str, Any]) -> None:
        """Send it something; an error if it is gone."""
        assert self._process.stdin is not None, "asked for a pipe"
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._lost() from error

    def answer(self, kind: str, *, limit_s: float | None = None, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """What the process answers; an error that it tells is raised.

        Args:
            limit_s: how long it may take.
            meanwhile: called every second.
        """
        start = time.monotonic()
        while True:
            try:
                event = self._events.get(timeout=POLL_S)
            except queue.Empty:
                meanwhile()
                if limit_s is not None and time.monotonic() - start > limit_s:
                    raise self._lost() from None
                continue
            if event is None:
                raise self._lost()
            if "error" in event:
                raise from_data(event["error"])
            return event[kind]

    def close(self) -> None:
        """End it; it leaves the cluster, and workers that are still training are ended."""
        assert self._process.stdin is not None, "asked for a pipe"
        with suppress(OSError):  # it has ended already
            self._process.stdin.close()
        try:
            self._process.wait(GOODBYE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> subprocess.Popen[str]:
        environment = {**{name: value for name, value in QUIET.items() if name not in os.environ}, **os.environ}
        with open(self._log, "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _DRIVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is told to it by closing its standard input
            )
        assert process.stdout is not None, "asked for a pipe"
        threading.Thread(target=_read, args=(process.stdout, self._events), daemon=True).start()
        return process

    def _lost(self) -> StorageError:
        told = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return StorageError(
            "the Ray cluster does not answer, or is gone",
            where=self._log,
            found=told[-1] if told else "nothing",
            next_step="the same command goes on from the last checkpoints once there is a cluster",
        )


def _read(stream: IO[str], events: queue.Queue[dict[str, Any] | None]) -> None:
    for line in stream:
        events.put(json.loads(line))
    events.put(None)
