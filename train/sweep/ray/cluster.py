"""What the processes that talk to Ray share: they join a cluster, check its nodes, and talk to a command.

Ray prints, changes the environment, installs signal handlers and aborts the connected process when the cluster goes
away. A separate process keeps all that out of the command. Messages are JSON, one object per line.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from cache_tools.errors import CacheError, StorageError, error_to_data
from cache_tools.system.processes import CLAIM
from train.sweep.ray.worker import check_versions, folder_not_seen, versions

CONNECT_S, PROBE_S = 10.0, 60.0
OBJECT_STORE_BYTES = 100_000_000  # small: no data go through it
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # would upload the working folder
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "PYTHONUNBUFFERED": "1",
}
_answers: TextIO = sys.stdout


def serve(do: Callable[[dict[str, Any]], None], work: str) -> None:
    """Connect, then do the jobs that come on standard input until it ends.

    Args:
        do: a job; it answers with `send`.
        work: as for `connect`.
    """
    global _answers
    _answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints goes to the log
    jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()

    try:
        hello = jobs.get()
        if hello is None:
            return
        folder = None if hello["folder"] is None else Path(hello["folder"])
        send({"nodes": connect(hello["address"], folder, hello["token"], work)})
        while (job := jobs.get()) is not None:
            do(job)
    except CacheError as error:
        send({"error": error_to_data(error)})
    except KeyboardInterrupt:
        pass
    finally:
        _shut_down()


def send(answer: Mapping[str, Any]) -> None:
    """Send a message to the command. A function of the module, because Ray Tune pickles what calls it."""
    print(json.dumps(answer), file=_answers, flush=True)


def connect(address: str | None, folder: Path | None, token: str, work: str = "sweep") -> list[dict[str, Any]]:
    """Join a cluster or start one, and check its nodes.

    Args:
        address: HOST:PORT, `auto` (the cluster on this machine) or `local` (a new one). None uses RAY_ADDRESS, else a
            cluster on this machine, else a new one.
        folder, token: as for `probe`; None if nodes need not see a folder.
        work: what the nodes take part in, for messages.

    Returns:
        Name, CPUs and GPUs of every node.

    Raises:
        StorageError: no cluster, or a node that does not answer or does not see the folder.
        MismatchError: a node with another version of a package that results depend on.
    """
    import ray

    _join(address)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    probes = [_probe(node, folder, token, work) for node in nodes]
    without_folder = [found["host"] for found in probes if not found["sees_folder"]]
    if folder is not None and without_folder:
        raise folder_not_seen(folder.parent, without_folder, work)
    wanted = versions()
    for found in probes:
        check_versions(found["versions"], wanted, found["host"])
    resources = [node["Resources"] for node in nodes]
    return [
        {"host": found["host"], "cpus": of_node.get("CPU", 0.0), "gpus": of_node.get("GPU", 0.0)}
        for found, of_node in zip(probes, resources, strict=True)
    ]


def reason_of(error: object) -> str:
    """Why a worker died, in one line."""
    from ray.exceptions import OutOfMemoryError, RayTaskError

    text = "" if error is None else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["Ray gives no reason"]
    if isinstance(error, OutOfMemoryError):
        return "Ray stopped it because its node was short of memory"
    if isinstance(error, RayTaskError):
        return lines[-1]
    reason = next((line for line in lines if line.startswith("The actor is dead because")), lines[0])
    return reason.partition(" Some common causes")[0]


def _join(address: str | None) -> None:
    import ray

    named = address or os.environ.get("RAY_ADDRESS") or None
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        if named not in {None, "auto", "local"}:
            _require_listener(str(named))
        if named is None:
            try:
                ray.init(address="auto", **options)
            except ConnectionError:
                ray.init(address="local", **options, **local)
        else:
            ray.init(address=named, **options, **(local if named == "local" else {}))
    except CacheError:
        raise
    except Exception as error:  # Ray raises many types: for other versions, no cluster, a foreign node
        raise _unreachable(named, error) from error


def _require_listener(address: str) -> None:
    """Raise if nothing listens at this address. Ray itself would try for a minute, then abort the process."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str | None, error: Exception) -> StorageError:
    return StorageError(
        "no Ray cluster can be used",
        where=address or "one on this machine",
        expected="HOST:PORT of a cluster that this machine is a node of, auto, or local",
        found=(str(error).strip().splitlines() or [type(error).__name__])[0],
        next_step="see `ray status`, or leave out --ray-address to start a cluster on this machine",
    )


def _probe(node: Mapping[str, Any], folder: Path | None, token: str, work: str) -> dict[str, Any]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    on_node = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
    remote = ray.remote(num_cpus=0, max_retries=1, scheduling_strategy=on_node)(_remote_probe())
    try:
        found: dict[str, Any] = ray.get(remote.remote(str(folder or ""), token), timeout=PROBE_S)
        return found
    except Exception as error:  # teacher-cache is not installed there, or the node does not answer
        raise StorageError(
            f"a node of the Ray cluster cannot take part in the {work}",
            where=node["NodeManagerHostname"],
            found=(str(error).strip().splitlines() or [type(error).__name__])[-1],
            next_step="install the same version of teacher-cache on it",
        ) from error


def _remote_probe() -> Callable[[str, str], dict[str, Any]]:
    """`worker.probe` for a process of Ray. Ray stores an inner function by its code, so that the process finds our
    packages before it imports one of them, even beside a user's own `train.py`."""
    claim = CLAIM

    def probe(folder: str, token: str) -> dict[str, Any]:
        importlib.import_module(claim)
        from train.sweep.ray import worker

        return worker.probe(folder, token)

    return probe


def _read(jobs: queue.Queue[dict[str, Any] | None]) -> None:
    """Queue jobs for the main thread; interrupt it when standard input ends."""
    for line in sys.stdin:
        jobs.put(json.loads(line))
    jobs.put(None)
    os.kill(os.getpid(), signal.SIGINT)


def _shut_down() -> None:
    if "ray" in sys.modules:
        import ray

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ray.shutdown()
