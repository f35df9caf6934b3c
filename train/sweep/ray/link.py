"""Start a process that talks to Ray (see `train.sweep.ray.cluster`), and exchange JSON messages with it."""

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
from train.sweep.ray.cluster import QUIET

POLL_S, GOODBYE_S = 1.0, 20.0


class Driver:
    """A process that runs `main` of a module.

    Args:
        log: file for everything that the process and Ray print.
        module: by default that of sweeps.
        resume: how the same command goes on after the cluster was lost.
    """

    def __init__(
        self, log: Path, module: str = "train.sweep.ray.driver", resume: str = "it resumes from the last checkpoints"
    ) -> None:
        self._log, self._module, self._resume = log, module, resume
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
            event = self.next_event(POLL_S)
            if event is not None:
                return event[kind]
            meanwhile()
            if timeout_s is not None and time.monotonic() - start > timeout_s:
                raise self._lost()

    def next_event(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message; None if none comes in time.

        Raises:
            CacheError, StorageError: as `receive`.
        """
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if event is None:
            raise self._lost()
        if "error" in event:
            raise error_from_data(event["error"])
        return event

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
                command_for(self._module),
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
            next_step=f"run the same command again once there is a cluster: {self._resume}",
        )


def _read(stream: IO[str], events: queue.Queue[dict[str, Any] | None]) -> None:
    with stream:
        for line in stream:
            events.put(json.loads(line))
    events.put(None)
