"""The process that talks to Ray for `RayEngine`. It reads jobs from standard input and answers on standard output.

Ray prints, changes the environment, installs signal handlers and aborts the connected process when the cluster goes
away. A separate process keeps all that out of the command. Messages are JSON, one object per line.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from cache_tools.errors import CacheError, MismatchError, StorageError, error_to_data
from cache_tools.system.processes import CLAIM
from train.sweep.ray.worker import folder_not_seen, versions

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


def main() -> None:
    """Connect, then train the jobs that come on standard input until it ends."""
    global _answers
    _answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints goes to the log
    jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()
    try:
        hello = jobs.get()
        if hello is None:
            return
        _send({"nodes": connect(hello["address"], Path(hello["folder"]), hello["token"])})
        while (job := jobs.get()) is not None:
            _send({"died": run_shares(job)})
    except CacheError as error:
        _send({"error": error_to_data(error)})
    except KeyboardInterrupt:
        pass
    finally:
        _shut_down()


def connect(address: str | None, folder: Path, token: str) -> list[dict[str, Any]]:
    """Join a cluster or start one, and check its nodes.

    Args:
        address: HOST:PORT, `auto` (the cluster on this machine) or `local` (a new one). None uses RAY_ADDRESS, else a
            cluster on this machine, else a new one.
        folder, token: as for `probe`.

    Returns:
        Name, CPUs and GPUs of every node.

    Raises:
        StorageError: no cluster, or a node that does not answer or does not see the folder.
        MismatchError: a node with another version of a package that results depend on.
    """
    import ray

    _join(address)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    probes = [_probe(node, folder, token) for node in nodes]
    if without_folder := [found["host"] for found in probes if not found["sees_folder"]]:
        raise folder_not_seen(folder.parent, without_folder)
    wanted = versions()
    for found in probes:
        for package, version in found["versions"].items():
            if version != wanted[package]:
                raise MismatchError(
                    f"a node of the Ray cluster has another version of {package}",
                    where=found["host"],
                    expected=wanted[package],
                    found=version,
                    next_step="install the same versions on all nodes",
                )
    resources = [node["Resources"] for node in nodes]
    return [
        {"host": found["host"], "cpus": of_node.get("CPU", 0.0), "gpus": of_node.get("GPU", 0.0)}
        for found, of_node in zip(probes, resources, strict=True)
    ]


def run_shares(job: Mapping[str, Any]) -> dict[str, str]:
    """Train shares, each as a Tune trial that restarts once if its worker dies. An error of a share is sent at once.

    Args:
        job: `shares` (JSON of `Share`), `cpus` and `gpus` of each, `at_once`, and the `folder` for Tune's own files.

    Returns:
        Number of a share whose worker died twice → the reason.
    """
    from ray import tune

    died: dict[str, str] = {}

    class Watch(tune.Callback):  # type: ignore[misc]  # Ray has no types
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            if result.get("error"):
                _send({"error": json.loads(result["error"])})

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            died[str(trial.config["share"])] = _reason(trial.get_pickled_error() or trial.get_error())

    folder = Path(job["folder"])
    shutil.rmtree(folder / "tune", ignore_errors=True)
    trainable = tune.with_parameters(_trainable(), shares=job["shares"])
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": job["cpus"], "gpu": job["gpus"]}),
        param_space={"share": tune.grid_search(list(range(len(job["shares"]))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=job["at_once"]),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            callbacks=[Watch()],
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    ).fit()
    shutil.rmtree(folder / "tune", ignore_errors=True)  # results are in the folders of the sweep's trials
    return died


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


def _probe(node: Mapping[str, Any], folder: Path, token: str) -> dict[str, Any]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    on_node = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
    remote = ray.remote(num_cpus=0, max_retries=1, scheduling_strategy=on_node)(_remote_probe())
    try:
        found: dict[str, Any] = ray.get(remote.remote(str(folder), token), timeout=PROBE_S)
        return found
    except Exception as error:  # teacher-cache is not installed there, or the node does not answer
        raise StorageError(
            "a node of the Ray cluster cannot take part in the sweep",
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


def _trainable() -> Callable[..., None]:
    """`worker.train_share` for a process of Ray; see `_remote_probe`."""
    claim = CLAIM

    def train_share(config: Mapping[str, Any], *, shares: Sequence[str]) -> None:
        importlib.import_module(claim)
        from train.sweep.ray import worker

        worker.train_share(config, shares=shares)

    return train_share


def _reason(error: object) -> str:
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


def _read(jobs: queue.Queue[dict[str, Any] | None]) -> None:
    """Queue jobs for the main thread; interrupt it when standard input ends."""
    for line in sys.stdin:
        jobs.put(json.loads(line))
    jobs.put(None)
    os.kill(os.getpid(), signal.SIGINT)


def _send(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), file=_answers, flush=True)


def _shut_down() -> None:
    if "ray" in sys.modules:
        import ray

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ray.shutdown()
