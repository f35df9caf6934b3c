"""Start the process that talks to Ray (`train.sweep.ray.driver`), and exchange JSON messages with it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from cache_tools.errors import StorageError, error_from_data
from cache_tools.system.processes import command_for
from train.sweep.ray.driver import QUIET

POLL_S, GOODBYE_S = 1.0, 20.0


class Driver:
    """A process that runs `train.sweep.ray.driver.main`.

    Args:
        log: file for everything that the process and Ray print.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._process = self._start()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message.

        Raises:
            StorageError: the process has ended.
        """
        assert self._process.stdin is not None, "asked for a pipe"
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._lost() from error

    def receive(
        self, kind: str, *, timeout_s: float | None = None, meanwhile: Callable[[], None] = lambda: None
    ) -> Any:
        """Wait for a message of this kind and return its content.

        Args:
            timeout_s: None waits for any length of time.
            meanwhile: called every second.

        Raises:
            CacheError: the one that the process sent.
            StorageError: the process has ended, or did not answer in time.
        """
        start = time.monotonic()
        while True:
            try:
                event = self._events.get(timeout=POLL_S)
            except queue.Empty:
                meanwhile()
                if timeout_s is not None and time.monotonic() - start > timeout_s:
                    raise self._lost() from None
                continue
            if event is None:
                raise self._lost()
            if "error" in event:
                raise error_from_data(event["error"])
            return event[kind]

    def close(self) -> None:
        """End the process. It leaves the cluster and stops workers that are still training."""
        assert self._process.stdin is not None, "asked for a pipe"
        with suppress(OSError):  # the process may have ended
            self._process.stdin.close()
        try:
            self._process.wait(GOODBYE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # and what Ray has started from it
            self._process.wait()

    def _start(self) -> subprocess.Popen[str]:
        environment = {**{name: value for name, value in QUIET.items() if name not in os.environ}, **os.environ}
        with open(self._log, "w") as log:
            process = subprocess.Popen(
                command_for("train.sweep.ray.driver"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches it as the end of its standard input
            )
        assert process.stdout is not None, "asked for a pipe"
        threading.Thread(target=_read, args=(process.stdout, self._events), daemon=True).start()
        return process

    def _lost(self) -> StorageError:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return StorageError(
            "the Ray cluster does not answer, or is gone",
            where=self._log,
            found=lines[-1] if lines else "nothing",
            next_step="run the same command again once there is a cluster: it resumes from the last checkpoints",
        )


def _read(stream: IO[str], events: queue.Queue[dict[str, Any] | None]) -> None:
    with stream:
        for line in stream:
            events.put(json.loads(line))
    events.put(None)
