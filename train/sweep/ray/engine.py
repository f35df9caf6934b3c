"""Share a sweep's trials among the nodes of a Ray cluster. Ray itself is imported in another process."""

from __future__ import annotations

import importlib.util
import math
import os
import socket
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cache_tools.errors import DeviceError, RecipeError
from cache_tools.files import put_durably
from cache_tools.home import registry
from cache_tools.home.origin import read_origin
from cache_tools.places import is_remote
from cache_tools.store.group import read_manifest
from train.runs.outcome import Failure, settled
from train.sweep.halving import Contest
from train.sweep.progress import SweepProgress
from train.sweep.ray.link import Driver
from train.sweep.ray.worker import TOKEN, KnownCache, Share
from train.sweep.recipe import Trial
from train.sweep.workers import shares

CONNECT_S = 180.0
_PACKAGES = ("ray", "pandas", "pyarrow", "fsspec")  # of ray[tune]


class OnRay:
    """An engine (`sweep_run.Engine`) on a Ray cluster: a Tune trial for each share of a batch stream.

    A worker or node that dies leaves checkpoints: its share is started again, elsewhere if need be. A share whose
    worker dies twice is cut into single trials, and the one whose worker dies twice then is the one that failed.
    The cluster is joined when there is something to train. A context manager: in the end the cluster is left, or ended
    if it was started here.

    Args:
        folder: of the sweep, on a disk that all nodes see under this path; Ray's files and what workers print come to
            `ray` in it.
        address: HOST:PORT of a cluster that this machine is a node of, `auto` for one that runs here, `local` for a new
            one; None takes RAY_ADDRESS, else one that runs here, else starts one.
        workers: shares at a time; by default what the cluster has room for.
        gpus: of each share where trials run on GPUs; 0.5 has two shares on each.
        threads: of torch in each worker, and CPUs that are reserved for it; by default as many as in this process.
        say: receives one line about the cluster.

    Raises:
        RecipeError: Ray is not installed.
        StorageError: no cluster there, or a node that cannot take part or does not see the folder.
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
        _require_ray()
        if address is not None and "://" in address:
            raise RecipeError(
                "sweeps do not go through Ray's client",
                where=f"--ray-address {address}",
                expected="HOST:PORT of a cluster that this machine is a node of",
                next_step="start the command on a node of the cluster (ray job submit)",
            )
        self._folder, self._address, self._say = _absolute(folder) / "ray", address, say
        self._workers, self._gpus, self._threads = workers, gpus, threads or _torch_threads()
        self._token = uuid.uuid4().hex
        self._driver: Driver | None = None
        self.nodes: list[dict[str, Any]] = []

    def __call__(self, streams: Sequence[Sequence[Trial]], contest: Contest | None) -> None:
        driver = self._driver = self._driver or self._connect()  # not before there is something to train
        todo = [trial for stream in streams for trial in stream]
        gpus = self._gpus if self._takes_gpus(todo) else 0.0
        count = self._room(gpus)
        waiting = shares(streams, count)
        with SweepProgress(f"sweep on Ray, {count} workers", todo) as progress:
            while waiting:
                driver.tell(self._job(waiting, contest, gpus, count))
                died: dict[str, str] = driver.answer("died", meanwhile=progress.look)
                waiting = [[trial] for number, how in died.items() for trial in _left(waiting[int(number)], how)]

    def __enter__(self) -> OnRay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster; workers that are still training are ended."""
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    def _connect(self) -> Driver:
        self._folder.mkdir(parents=True, exist_ok=True)
        put_durably(self._folder / TOKEN, self._token.encode())
        driver = Driver(self._folder / "driver.log")
        try:
            driver.tell({"address": self._address, "folder": str(self._folder), "token": self._token})
            self.nodes = driver.answer("nodes", limit_s=CONNECT_S)
        except BaseException:
            driver.close()
            raise
        cpus, cards = (sum(node[kind] for node in self.nodes) for kind in ("cpus", "gpus"))
        self._say(f"Ray: {len(self.nodes)} node{'s' * (len(self.nodes) != 1)}, {cpus:g} CPUs, {cards:g} GPUs")
        return driver

    def _job(
        self, waiting: Sequence[Sequence[Trial]], contest: Contest | None, gpus: float, count: int
    ) -> dict[str, Any]:
        caches: dict[str, KnownCache] = {}
        jobs = [self._share(number, share, contest, caches) for number, share in enumerate(waiting)]
        return {
            "shares": [job.model_dump_json() for job in jobs],
            "cpus": self._threads,
            "gpus": gpus,
            "at_once": count,
            "folder": str(self._folder),
        }

    def _share(
        self, number: int, trials: Iterable[Trial], contest: Contest | None, caches: dict[str, KnownCache]
    ) -> Share:
        placed = [_placed(trial) for trial in trials]
        names = {trial.recipe.cache for trial in placed if trial.recipe.cache and not is_remote(trial.recipe.cache)}
        for name in names - caches.keys():
            caches[name] = _known(name)
        if contest is not None:
            folders = tuple(_absolute(folder) for folder in contest.folders)
            contest = contest.model_copy(update={"folders": folders})
        return Share(
            trials=tuple(trial.model_dump(mode="json") for trial in placed),
            contest=None if contest is None else contest.model_dump(mode="json"),
            threads=self._threads,
            folder=self._folder,
            token=self._token,
            log=f"share-{number}.log",
            working_folder=Path.cwd(),
            host=socket.gethostname(),
            caches={name: caches[name] for name in names},
        )

    def _takes_gpus(self, trials: Sequence[Trial]) -> bool:
        devices = {trial.recipe.device for trial in trials}
        for device in devices:
            if device.startswith("cuda:"):
                raise DeviceError(
                    "Ray chooses the GPU of a trial", where=f"--device {device}", expected="auto, cpu or cuda"
                )
        there = any(node["gpus"] > 0 for node in self.nodes)
        return "cuda" in devices or ("auto" in devices and there)

    def _room(self, gpus: float) -> int:
        """Shares at a time."""
        fits = [min(node["cpus"] // self._threads, node["gpus"] / gpus if gpus else math.inf) for node in self.nodes]
        room = sum(int(each) for each in fits)
        if self._workers is None and room == 0:
            raise DeviceError(
                "no node of the Ray cluster has room for a trial",
                where=", ".join(f"{node['host']}: {node['cpus']:g} CPUs, {node['gpus']:g} GPUs" for node in self.nodes),
                expected=f"{self._threads} CPUs (torch's threads here) and {gpus:g} GPUs",
                next_step="set OMP_NUM_THREADS to less, or give --workers if the cluster grows by itself",
            )
        return self._workers or room


def _left(share: Sequence[Trial], how: str) -> list[Trial]:
    """What is to be started again of a share whose worker died twice, trial by trial."""
    left = [trial for trial in share if not settled(trial.folder)]
    if len(share) > 1:
        return left
    for trial in left:
        Failure(kind="died", message=f"its worker died twice: {how}").save(trial.folder)
    return []


def _require_ray() -> None:
    if any(importlib.util.find_spec(package) is None for package in _PACKAGES):
        raise RecipeError(
            "the engine 'ray' needs a package that is not installed",
            where="--engine ray",
            next_step="install it: pip install 'teacher-cache[ray]'",
        )


def _placed(trial: Trial) -> Trial:
    """A trial that means the same from any working folder."""
    recipe = trial.recipe
    changes = {
        "out": _absolute(trial.folder),
        "data_dir": None if recipe.data_dir is None else _absolute(recipe.data_dir),
        "dataset": None if recipe.dataset is None else recipe.dataset.absolute(),
    }
    return trial.model_copy(update={"recipe": recipe.model_copy(update=changes)})


def _known(reference: str) -> KnownCache:
    path = registry.resolve(reference)
    origin = read_origin(path)
    return KnownCache(
        path=_absolute(path),
        fingerprint=read_manifest(path).fingerprint,
        url=None if origin is None else origin.url,
    )


def _absolute(path: Path) -> Path:
    """Links are left alone: what they lead to may be called otherwise on another node."""
    return Path(os.path.abspath(path.expanduser()))


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()
