"""A Ray cluster of two nodes on this machine, each with a loopback address and a cache home of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Ray takes 127.0.0.1 for a name of the machine's outer address.
ADDRESSES = ("127.0.0.2", "127.0.0.3")
# A cluster that was once started in this home may have left a token, and nodes disagree about whether it is wanted.
SETTINGS = {"RAY_AUTH_MODE": "disabled"}
START_S = 90.0


class Cluster:
    """Two raylets with one CPU each; the first one has the head.

    Attributes:
        address: HOST:PORT of the head.
        homes: the nodes' cache homes.
    """

    def __init__(self, root: Path) -> None:
        self._sockets = Path(tempfile.mkdtemp(prefix="r"))  # their names are too long below a test's folder
        self.homes = (root / "home-0", root / "home-1")
        self._port = _free_port()
        self.address = f"{ADDRESSES[0]}:{self._port}"
        self._logs = root
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, node: int) -> None:
        """Start a node and wait until it is one of the cluster's."""
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
        """All that belongs to a node, at once."""
        for pid in processes(str(self.homes[node])):
            _kill(pid)
        self._nodes.pop(node).wait()

    def workers(self, node: int) -> list[int]:
        """Processes of a node that train."""
        return [pid for pid in processes(str(self.homes[node])) if "ImplicitFunc" in _command(pid)]

    def stop(self) -> None:
        for node in list(self._nodes):
            self.kill(node)
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _until(self, text: str, node: int) -> None:
        log, end = self._logs / f"node-{node}.log", time.monotonic() + START_S
        while text not in log.read_text(errors="replace"):
            ended = self._nodes[node].poll() is not None
            if ended or time.monotonic() > end:
                raise RuntimeError(f"no Ray node: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)


@contextmanager
def cluster(root: Path) -> Iterator[Cluster]:
    """A cluster with both nodes up."""
    made = Cluster(root)
    try:
        made.start(0)
        made.start(1)
        yield made
    finally:
        made.stop()


def stopped_half_way(trials: Path, of: Iterable[int]) -> int | None:
    """A process that trains one of the trials below a folder, after its first checkpoint and before its end.

    Args:
        of: processes that may be it. It is left stopped, so that it stays half-way until it is killed.
    """
    for pid in of:
        for state in trials.glob("*/state.pt"):
            if not _has_open(pid, state.with_name(".lock")):
                continue
            os.kill(pid, signal.SIGSTOP)
            if not state.with_name("result.json").exists():
                return pid
            os.kill(pid, signal.SIGCONT)
    return None


def processes(home: str) -> list[int]:
    """Those whose cache home this is, as a node's daemons and workers inherit it, and what these have started."""
    wanted = f"TEACHER_CACHE_HOME={home}".encode()
    found, parents = set(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
        except OSError:  # gone, or not ours
            continue
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more  # some overwrite their environment with their title
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
        except OSError:  # closed by now
            continue
    return False


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.create_server((ADDRESSES[0], 0)) as listening:
        return int(listening.getsockname()[1])
