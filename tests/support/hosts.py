"""Hosts on one machine: network namespaces on a bridge, each with its own process ids, cache home and address."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NET = "10.77.43"


class Host:
    """One host.

    Attributes:
        address: in the network of all hosts.
        home: its cache home.
    """

    def __init__(self, name: str, number: int, root: Path) -> None:
        self.name, self.address, self.home = name, f"{NET}.{number}", root / f"home-{number}"
        self.home.mkdir()

    def start(self, words: Sequence[object], **variables: object) -> subprocess.Popen[str]:
        """Start a command on it, with process ids of its own."""
        own = {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "TEACHER_CACHE_HOME": self.home, "XDG_STATE_HOME": self.home}
        environment = os.environ | {name: str(value) for name, value in (own | variables).items()}
        inside = ["ip", "netns", "exec", self.name, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [*inside, *map(str, words)]
        return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)  # type: ignore[call-overload]

    def moved(self) -> tuple[int, int]:
        """Bytes that it has received and sent, headers included."""
        table = _run("ip", "netns", "exec", self.name, "cat", "/proc/net/dev")
        (fields,) = [line.split()[1:] for line in table.splitlines() if line.strip().startswith("eth0:")]
        return int(fields[0]), int(fields[8])


@contextmanager
def hosts(count: int, root: Path) -> Iterator[list[Host]]:
    """Hosts that reach each other; skips the test where root may not make namespaces. The last one has the bridge."""
    names = [f"tc{os.getpid()}-{number}" for number in range(1, count + 1)]
    try:
        try:
            for name in names:
                _run("ip", "netns", "add", name)
                _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "netns", "exec", names[0], "unshare", "--pid", "--fork", "--mount-proc", "true")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs network namespaces: {error}")
        hub = names[-1]
        _run("ip", "-n", hub, "link", "add", "eth0", "type", "bridge")
        for number, name in enumerate(names[:-1], 1):
            port = f"port{number}"
            _run("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", hub)
            _run("ip", "-n", hub, "link", "set", port, "master", "eth0", "up")
        for number, name in enumerate(names, 1):
            _run("ip", "-n", name, "addr", "add", f"{NET}.{number}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
        yield [Host(name, number, root) for number, name in enumerate(names, 1)]
    finally:
        for name in names:
            with suppress(OSError, subprocess.CalledProcessError):
                _run("ip", "netns", "del", name)


@contextmanager
def store_on(host: Host) -> Iterator[dict[str, str]]:
    """An S3 server on a host; yields the variables that point a client to it."""
    code = (
        "import json, os, time\n"
        "os.dup2(os.open(os.devnull, os.O_WRONLY), 2)\n"  # it logs every request, and nobody reads the pipe
        "from tests.support.s3_server import environment, new_bucket, s3_server\n"
        f"with s3_server({host.address!r}, 5000) as variables, environment(variables):\n"
        "    print(json.dumps({**variables, 'BUCKET': new_bucket()}), flush=True)\n"
        "    time.sleep(3600)"
    )
    import json

    server = host.start([sys.executable, "-c", code])
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line, server.communicate()
        yield json.loads(line)
    finally:
        end(server)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a command on a host, as if the host had lost its power."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=30).stdout
