"""The process that talks to Ray for `sweep_ray.OnRay`: shares come on standard input, outcomes go to standard output.

Ray prints, changes the environment, installs handlers and, when a cluster goes away, aborts the process that is
connected to it. All that stays here. One JSON object per line, in both directions.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from cache_tools.errors import CacheError, MismatchError, StorageError
from train.sweep.ray.worker import as_data, probe, train_share, unseen, versions

CONNECT_S, PROBE_S = 10.0, 60.0
OBJECT_STORE_BYTES = 100_000_000  # nothing goes through it
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # would upload the working folder
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "PYTHONUNBUFFERED": "1",
}
_events: TextIO = sys.stdout


def main() -> None:
    """Connect, then train what standard input names until it ends."""
    global _events
    _events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints goes where errors go
    jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()
    try:
        hello = jobs.get()
        if hello is None:
            return
        _tell({"nodes": connect(hello["address"], Path(hello["folder"]), hello["token"])})
        while (job := jobs.get()) is not None:
            _tell({"died": run_shares(job)})
    except CacheError as error:
        _tell({"error": as_data(error)})
    except KeyboardInterrupt:
        pass
    finally:
        _shut_down()


def connect(address: str | None, folder: Path, token: str) -> list[dict[str, Any]]:
    """Join a cluster or start one, and look at its nodes.

    Args:
        address: HOST:PORT, `auto` (one that runs here), `local` (a new one); None for RAY_ADDRESS, else one that runs
            here, else a new one.
        folder, token: of the sweep, as `probe` takes them.

    Returns:
        name, CPUs and GPUs of every node.

    Raises:
        StorageError: no cluster, or a node that does not answer or does not see the folder.
        MismatchError: a node with other versions of what results depend on.
    """
    import ray

    _join(address)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    found = [_look(node, folder, token) for node in nodes]
    if blind := [each["host"] for each in found if not each["sees"]]:
        raise unseen(folder.parent, blind)
    mine = versions()
    for each in found:
        for package, theirs in each["versions"].items():
            if theirs != mine[package]:
                raise MismatchError(
                    f"a node of the Ray cluster has another version of {package}",
                    where=each["host"],
                    expected=mine[package],
                    found=theirs,
                    next_step="install the same versions on all nodes",
                )
    resources = [node["Resources"] for node in nodes]
    return [
        {"host": each["host"], "cpus": has.get("CPU", 0.0), "gpus": has.get("GPU", 0.0)}
        for each, has in zip(found, resources, strict=True)
    ]


def run_shares(job: Mapping[str, Any]) -> dict[str, str]:
    """Train shares, each as a Tune trial that is started again once if its worker dies.

    Args:
        job: `shares` (JSON of `Share`), `cpus` and `gpus` of each, `at_once`, and the `folder` for Tune's own files.

    Returns:
        by number of a share whose worker died again, how it did. An error that concerns all is told at once.
    """
    from ray import tune

    died: dict[str, str] = {}

    class Watch(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            if result.get("error"):
                _tell({"error": json.loads(result["error"])})

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            _note_death(trial.config["share"], trial.get_pickled_error() or trial.get_error())

    def _note_death(share: int, error: object) -> None:
        died[str(share)] = _reason(error)

    folder = Path(job["folder"])
    shutil.rmtree(folder / "tune", ignore_errors=True)
    trainable = tune.with_parameters(train_share, shares=job["shares"])
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
    shutil.rmtree(folder / "tune", ignore_errors=True)  # what is worth keeping is in the folders of the trials
    return died


def _join(address: str | None) -> None:
    import ray

    named = address or os.environ.get("RAY_ADDRESS") or None
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        if named not in {None, "auto", "local"}:
            _answers(str(named))
        if named is None:
            try:
                ray.init(address="auto", **options)
            except ConnectionError:
                ray.init(address="local", **options, **local)
        else:
            ray.init(address=named, **options, **(local if named == "local" else {}))
    except CacheError:
        raise
    except Exception as error:  # whatever Ray raises: other versions of it, no cluster, a node that is not of it
        raise _unreachable(named, error) from error


def _answers(address: str) -> None:
    """Whether anything listens there; Ray itself would try for a minute, then abort."""
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


def _look(node: Mapping[str, Any], folder: Path, token: str) -> dict[str, Any]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
    remote = ray.remote(num_cpus=0, max_retries=1, scheduling_strategy=there)(probe)
    try:
        return ray.get(remote.remote(str(folder), token), timeout=PROBE_S)
    except Exception as error:  # no package there, no answer
        raise StorageError(
            "a node of the Ray cluster cannot take part in the sweep",
            where=node["NodeManagerHostname"],
            found=(str(error).strip().splitlines() or [type(error).__name__])[-1],
            next_step="install teacher-cache there, in the same version",
        ) from error


def _reason(error: object) -> str:
    """How a worker died, in one line."""
    from ray.exceptions import OutOfMemoryError, RayTaskError

    text = "" if error is None else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["for no reason that Ray knows"]
    if isinstance(error, OutOfMemoryError):
        return "stopped by Ray: its node was short of memory"
    if isinstance(error, RayTaskError):
        return lines[-1]
    told = next((line for line in lines if line.startswith("The actor is dead because")), lines[0])
    return told.partition(" Some common causes")[0]


def _read(jobs: queue.Queue[dict[str, Any] | None]) -> None:
    """Jobs for the main thread; when standard input ends, whatever is going on is broken off."""
    for line in sys.stdin:
        jobs.put(json.loads(line))
    jobs.put(None)
    os.kill(os.getpid(), signal.SIGINT)


def _tell(event: Mapping[str, Any]) -> None:
    print(json.dumps(event), file=_events, flush=True)


def _shut_down() -> None:
    if "ray" in sys.modules:
        import ray

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ray.shutdown()
