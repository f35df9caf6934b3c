"""A Ray cluster of two nodes on this machine, each with its own loopback address and cache home."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Not 127.0.0.1: Ray replaces it by the address of the machine.
ADDRESSES = ("127.0.0.2", "127.0.0.3")
# An earlier cluster may have left a token in the home folder, which some nodes would then ask for.
SETTINGS = {"RAY_AUTH_MODE": "disabled"}
START_S = 90.0


class Cluster:
    """Two raylets with one CPU each. The first one is the head.

    Attributes:
        address: HOST:PORT of the head.
        homes: cache home of each node.
    """

    def __init__(self, root: Path) -> None:
        self._sockets = Path(tempfile.mkdtemp(prefix="r"))  # paths of sockets must be short
        self.homes = (root / "home-0", root / "home-1")
        self._port = _free_port()
        self.address = f"{ADDRESSES[0]}:{self._port}"
        self._logs = root
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, node: int) -> None:
        """Start a node and wait until it has joined the cluster."""
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        words += ["--num-cpus=1", f"--node-ip-address={ADDRESSES[node]}", "--object-store-memory=80000000"]
        if node == 0:
            words += ["--head", f"--port={self._port}", f"--temp-dir={self._sockets}", "--include-dashboard=false"]
        else:
            words.append(f"--address={self.address}")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {
            **SETTINGS,
            "PYTHONPATH": str(ROOT),
            "TEACHER_CACHE_HOME": str(self.homes[node]),
            "OMP_NUM_THREADS": "1",
        }
        with open(self._logs / f"node-{node}.log", "wb") as log:
            self._nodes[node] = subprocess.Popen(
                words, stdout=log, stderr=log, env=environment, cwd="/", start_new_session=True
            )
        self._until("This command will now block", node)

    def kill(self, node: int) -> None:
        """Kill all processes of a node."""
        for pid in processes(str(self.homes[node])):
            _kill(pid)
        self._nodes.pop(node).wait()

    def workers(self, node: int) -> list[int]:
        """Processes of a node that train trials."""
        return [pid for pid in processes(str(self.homes[node])) if "ImplicitFunc" in _command(pid)]

    def builders(self, node: int) -> list[int]:
        """Processes of a node that build a cache."""
        return [pid for pid in processes(str(self.homes[node])) if "CacheBuilder" in _command(pid)]

    def is_running(self, node: int) -> bool:
        return node in self._nodes

    def stop(self) -> None:
        for node in list(self._nodes):
            self.kill(node)
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _until(self, text: str, node: int) -> None:
        log, end = self._logs / f"node-{node}.log", time.monotonic() + START_S
        while text not in log.read_text(errors="replace"):
            has_ended = self._nodes[node].poll() is not None
            if has_ended or time.monotonic() > end:
                raise RuntimeError(f"no Ray node: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)


@contextmanager
def cluster(root: Path) -> Iterator[Cluster]:
    """Run a cluster of both nodes."""
    nodes = Cluster(root)
    try:
        nodes.start(0)
        nodes.start(1)
        yield nodes
    finally:
        nodes.stop()


class meanwhile:
    """Call a function again and again in a thread beside the test, until it returns True."""

    def __init__(self, work: Callable[[], bool]) -> None:
        self._work, self.done, self._stop = work, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> threading.Event:
        self._thread.start()
        return self.done

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._work():
                self.done.set()
                return
            time.sleep(0.02)


def suspend_half_way(trials: Path, pids: Iterable[int]) -> int | None:
    """Suspend (SIGSTOP) a process that is training a trial, after its first checkpoint and before its end.

    Args:
        trials: folder of the trials.
        pids: processes to look at.

    Returns:
        The process, None if none is half-way.
    """
    for pid in pids:
        for state in trials.glob("*/state.pt"):
            if not _has_open(pid, state.with_name(".lock")):
                continue
            os.kill(pid, signal.SIGSTOP)
            if not state.with_name("result.json").exists():
                return pid
            os.kill(pid, signal.SIGCONT)
    return None


def processes(home: str) -> list[int]:
    """Processes with this cache home, which daemons and workers of a node inherit, and their descendants."""
    wanted = f"TEACHER_CACHE_HOME={home}".encode()
    found, parents = set(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
        except OSError:  # the process has ended or belongs to another user
            continue
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more  # some processes overwrite their environment with their title
    return sorted(found - {os.getpid()})


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _has_open(pid: int, file: Path) -> bool:
    for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            if os.readlink(descriptor) == str(file):
                return True
        except OSError:  # closed meanwhile
            continue
    return False


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.create_server((ADDRESSES[0], 0)) as listening:
        return int(listening.getsockname()[1])
