"""The engine that trains a sweep's trials on the nodes of a Ray cluster. Ray is imported in another process only."""

from __future__ import annotations

import math
import os
import socket
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cache_tools.config import Changes
from cache_tools.errors import DeviceError, RecipeError
from cache_tools.files import put_durably
from cache_tools.home import registry
from cache_tools.home.origin import read_origin
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.places import is_remote
from cache_tools.storage import remote_url
from cache_tools.store.group import read_manifest
from cache_tools.system import named
from cache_tools.system.arguments import expand_user
from train.runs.outcome import Failure, is_settled
from train.sweep.halving import Halving
from train.sweep.progress import SweepProgress
from train.sweep.ray import require_ray
from train.sweep.ray.link import Driver
from train.sweep.ray.worker import TOKEN, Share, SourceCache
from train.sweep.recipe import Trial
from train.sweep.workers import divide_streams

CONNECT_S = 180.0


class RayEngine:
    """An engine (`train.sweep.run.Engine`) on a Ray cluster, with a Tune trial for each share of a batch stream.

    If a worker or node dies, its share continues from the checkpoints, on another node if necessary. A share whose
    worker dies twice is divided into single trials; a single trial whose worker dies twice has failed.
    The engine joins the cluster when there is something to train. It is a context manager: at the end it leaves the
    cluster, and stops it if it has started it.

    Args:
        folder: of the sweep, on a disk that all nodes see under this path. Ray's files and the workers' logs are in
            `ray` below it.
        address: HOST:PORT of a cluster that this machine is a node of, `auto` for the one that runs on this machine,
            `local` for a new one. None uses RAY_ADDRESS, else a cluster that runs on this machine, else a new one.
        workers: number of shares at a time; by default as many as the cluster has room for.
        gpus: per share where trials run on GPUs; 0.5 puts two shares on each.
        threads: of torch in each worker, and CPUs reserved for it; by default as many as in this process.
        say: receives one line about the cluster.

    Raises:
        RecipeError: Ray is not installed.
        StorageError: no such cluster, or a node that cannot take part or does not see the folder.
        MismatchError: nodes with other versions.
    """

    def __init__(
        self,
        folder: Path,
        address: str | None = None,
        *,
        workers: int | None = None,
        gpus: float = 1.0,
        threads: int | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        require_ray()
        check_address(address)
        self._folder, self._address, self._say = _absolute(folder) / "ray", address, say
        self._workers, self._gpus, self._threads = workers, gpus, threads or torch_threads()
        self._token = uuid.uuid4().hex
        self._driver: Driver | None = None
        self.nodes: list[dict[str, Any]] = []

    def __call__(self, streams: Sequence[Sequence[Trial]], halving: Halving | None) -> None:
        driver = self._driver = self._driver or self._connect()
        trials = [trial for stream in streams for trial in stream]
        gpus = self._gpus if self._uses_gpus(trials) else 0.0
        count = self._room(gpus)
        waiting = divide_streams(streams, count)
        with SweepProgress(f"sweep on Ray, {count} workers", trials) as progress:
            while waiting:
                driver.send(self._job(waiting, halving, gpus, count))
                died: dict[str, str] = driver.receive("died", meanwhile=progress.update)
                retried = [trial for share, reason in died.items() for trial in _retried(waiting[int(share)], reason)]
                waiting = [[trial] for trial in retried]

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster and stop workers that are still training."""
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    def _connect(self) -> Driver:
        self._folder.mkdir(parents=True, exist_ok=True)
        put_durably(self._folder / TOKEN, self._token.encode())
        driver = Driver(self._folder / "driver.log")
        try:
            driver.send({"address": self._address, "folder": str(self._folder), "token": self._token})
            self.nodes = driver.receive("nodes", timeout_s=CONNECT_S)
        except BaseException:
            driver.close()
            raise
        cpus, gpus = (sum(node[kind] for node in self.nodes) for kind in ("cpus", "gpus"))
        self._say(f"Ray: {len(self.nodes)} node{'s' * (len(self.nodes) != 1)}, {cpus:g} CPUs, {gpus:g} GPUs")
        return driver

    def _job(
        self, shares: Sequence[Sequence[Trial]], halving: Halving | None, gpus: float, count: int
    ) -> dict[str, Any]:
        caches: dict[str, SourceCache] = {}
        workers = min(count, max(1, *self._fitting(gpus))), math.ceil(1 / gpus) if gpus else 1
        prepared = [self._share(number, share, halving, caches, workers) for number, share in enumerate(shares)]
        return {
            "shares": [share.model_dump_json() for share in prepared],
            "cpus": self._threads,
            "gpus": gpus,
            "at_once": count,
            "folder": str(self._folder),
        }

    def _share(
        self,
        number: int,
        trials: Iterable[Trial],
        halving: Halving | None,
        caches: dict[str, SourceCache],
        workers: tuple[int, int],
    ) -> Share:
        absolute = [_with_absolute_paths(trial) for trial in trials]
        names = {trial.recipe.cache for trial in absolute if trial.recipe.cache and not is_remote(trial.recipe.cache)}
        for name in names - caches.keys():
            caches[name] = _source_cache(name)
        if halving is not None:
            folders = tuple(_absolute(folder) for folder in halving.folders)
            halving = halving.model_copy(update={"folders": folders})
        return Share(
            trials=tuple(trial.model_dump(mode="json") for trial in absolute),
            halving=None if halving is None else halving.model_dump(mode="json"),
            threads=self._threads,
            folder=self._folder,
            token=self._token,
            log=f"share-{number}.log",
            working_folder=Path.cwd(),
            host=socket.gethostname(),
            caches={name: caches[name] for name in names},
            workers=workers,
        )

    def _uses_gpus(self, trials: Sequence[Trial]) -> bool:
        devices = {trial.recipe.device for trial in trials}
        for device in devices:
            if device.startswith("cuda:"):
                raise DeviceError(
                    "Ray chooses the GPU of a trial", where=f"--device {device}", expected="auto, cpu or cuda"
                )
        has_gpus = any(node["gpus"] > 0 for node in self.nodes)
        return "cuda" in devices or ("auto" in devices and has_gpus)

    def _fitting(self, gpus: float) -> list[int]:
        """Number of shares at a time on each node."""
        return [
            int(min(node["cpus"] // self._threads, node["gpus"] / gpus if gpus else math.inf)) for node in self.nodes
        ]

    def _room(self, gpus: float) -> int:
        """Number of shares at a time."""
        room = sum(self._fitting(gpus))
        if self._workers is None and room == 0:
            raise DeviceError(
                "no node of the Ray cluster has room for a trial",
                where=", ".join(f"{node['host']}: {node['cpus']:g} CPUs, {node['gpus']:g} GPUs" for node in self.nodes),
                expected=f"{self._threads} CPUs (as many as torch has threads) and {gpus:g} GPUs",
                next_step="lower OMP_NUM_THREADS, or give --workers if the cluster grows by itself",
            )
        return self._workers or room


def _retried(share: Sequence[Trial], reason: str) -> list[Trial]:
    """The trials of a share whose worker died twice that are trained again, one by one. A single trial has failed."""
    unsettled = [trial for trial in share if not is_settled(trial.folder)]
    if len(share) > 1:
        return unsettled
    for trial in unsettled:
        Failure(kind="died", message=f"its worker died twice: {reason}").save(trial.folder)
    return []


def check_address(address: str | None) -> None:
    """Raise if an address is not one that our commands can use.

    Raises:
        RecipeError: of Ray's client.
    """
    if address is not None and "://" in address:
        raise RecipeError(
            "commands do not go through Ray's client",
            where=f"--ray-address {address}",
            expected="HOST:PORT of a cluster that this machine is a node of",
            next_step="start the command on a node of the cluster (ray job submit)",
        )


def _with_absolute_paths(trial: Trial) -> Trial:
    """The same trial for a process in another working folder."""
    recipe = trial.recipe
    changes = {
        "out": _absolute(trial.folder),
        "data_dir": None if recipe.data_dir is None else _absolute(recipe.data_dir),
        "dataset": _with_absolute_folder(recipe.dataset),
    }
    return trial.model_copy(update={"recipe": recipe.model_copy(update=changes)})


def _with_absolute_folder(dataset: DatasetRecipe | Changes | None) -> DatasetRecipe | Changes | None:
    if isinstance(dataset, DatasetRecipe):
        return dataset.absolute()
    if dataset is None or dataset.values.get("data_dir") is None:
        return dataset
    return Changes(**dataset.values | {"data_dir": str(_absolute(Path(dataset.values["data_dir"])))})


def _source_cache(reference: str) -> SourceCache:
    path = registry.resolve(reference)
    origin = read_origin(path)
    return SourceCache(
        path=_absolute(path),
        fingerprint=read_manifest(path).fingerprint,
        url=origin.url if origin is not None and named.is_named("stores", origin.url) else None,
    )


def _absolute(path: Path) -> Path:
    """An absolute path with its links: their targets may have other paths on another node. A URL stays."""
    return path if remote_url(path) else Path(os.path.abspath(expand_user(path)))


def torch_threads() -> int:
    """Threads of torch in this process."""
    import torch

    return torch.get_num_threads()
