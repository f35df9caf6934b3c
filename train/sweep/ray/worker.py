"""Functions that run on the nodes of a Ray cluster: `probe` checks a node, `train_share` trains trials of a sweep.

Arguments and errors travel as plain data, so that no process has to unpickle an exception.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_tools.config import Frozen
from cache_tools.console import EscapedStream
from cache_tools.errors import CacheError, MismatchError, NotFoundError, StorageError, error_to_data
from cache_tools.system import named
from cache_tools.system.quiet import quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Iterator

    from train.sweep.recipe import Trial

PACKAGES = ("teacher-cache", "torch", "ray")
TOKEN = "token"
WAIT_FOR_LOCK_S = 60.0


class SourceCache(Frozen):
    """A cache on a disk of the machine that started the sweep, for another node to find its own copy of it.

    Attributes:
        path: absolute.
        url: of the remote cache that it mirrors.
    """

    path: Path
    fingerprint: str
    url: str | None = None


class Share(Frozen):
    """Trials of one batch stream that one worker trains.

    Attributes:
        trials: `Trial`s as plain data, with absolute paths.
        halving: `Halving` as plain data.
        threads: of torch.
        folder: for Ray's files, in the sweep's folder; `token` is the content of the file TOKEN in it.
        log: name of the file in that folder for everything the worker prints.
        working_folder: in which the sweep was started; used if the node has it.
        host: on which the sweep was started.
        caches: by their name in the recipes.
        workers: at most so many on one machine, and on one device.
    """

    trials: tuple[dict[str, Any], ...]
    halving: dict[str, Any] | None
    threads: int
    folder: Path
    token: str
    log: str
    working_folder: Path
    host: str
    caches: dict[str, SourceCache]
    workers: tuple[int, int] = (1, 1)


def probe(folder: str, token: str) -> dict[str, Any]:
    """A node's name, its versions, and whether it sees the sweep's folder: the one with this token in it."""
    return {"host": socket.gethostname(), "versions": versions(), "sees_folder": sees(Path(folder), token)}


def versions() -> dict[str, str]:
    """Versions of the packages that must be the same on all nodes."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def train_share(config: Mapping[str, Any], *, shares: Sequence[str]) -> None:
    """A Tune trial: train the share with the number `config["share"]`, and report an error that concerns all trials."""
    from ray import tune

    share = Share.model_validate_json(shares[config["share"]])
    try:
        _train(share)
        problem = None
    except CacheError as error:
        problem = error_to_data(error)
        if socket.gethostname() != share.host:
            problem["where"] = f"{problem['where'] or 'a node'}, on {socket.gethostname()}"
    tune.report({"error": "" if problem is None else json.dumps(problem)})


def check_versions(found: Mapping[str, str], wanted: Mapping[str, str], host: str) -> None:
    """Raise if a node has other versions.

    Raises:
        MismatchError: another version of a package that results depend on.
    """
    for package, number in found.items():
        if number != wanted[package]:
            raise MismatchError(
                f"a node of the Ray cluster has another version of {package}",
                where=host,
                expected=wanted[package],
                found=number,
                next_step="install the same versions on all nodes",
            )


def folder_not_seen(folder: Path, hosts: Iterable[str], work: str = "sweep") -> StorageError:
    """The error for nodes that do not see the folder of a sweep or of another work."""
    return StorageError(
        f"nodes of the Ray cluster do not see the folder of the {work}",
        where=folder,
        expected="the same folder under the same path on every node",
        found=f"not on {', '.join(sorted(set(hosts)))}",
        next_step="choose an --out on a disk that all nodes share" + (", or a URL" if work == "build" else ""),
    )


def _train(share: Share) -> None:
    if not sees(share.folder, share.token):
        raise folder_not_seen(share.folder.parent, [socket.gethostname()])
    with _printing_to(share.folder / share.log):
        import torch

        from cache_tools.system.memory import keep_freed_memory
        from train.sweep.halving import Halving
        from train.sweep.recipe import Trial
        from train.sweep.streams import image_opener, train_stream

        os.chdir(share.working_folder if share.working_folder.is_dir() else share.folder.parent)
        keep_freed_memory()
        torch.set_num_threads(share.threads)  # Ray changes OMP_NUM_THREADS
        trials = [_with_cache(Trial.model_validate(trial), share.caches) for trial in share.trials]
        halving = None if share.halving is None else Halving.model_validate(share.halving)
        _wait_for_locks([trial.folder for trial in trials])
        with quiet_libraries():
            train_stream(trials, halving=halving, open_split=image_opener(), workers=share.workers)


def _with_cache(trial: Trial, caches: Mapping[str, SourceCache]) -> Trial:
    """The trial with a reference to its cache that works on this node: a folder with the same cache, or a URL."""
    name = trial.recipe.cache
    if name is None or name not in caches:
        return trial
    reference = find_cache(name, caches[name])
    return trial.model_copy(update={"recipe": trial.recipe.model_copy(update={"cache": reference})})


def find_cache(reference: str, source: SourceCache) -> str:
    """The path, name or URL under which this node finds a cache.

    Raises:
        NotFoundError: the node does not have the cache, and the cache has no URL.
    """
    from cache_tools.home.registry import resolve
    from cache_tools.store.group import read_manifest

    if source.url is not None:  # named where the sweep was started
        named.remember("stores", source.url)
    for candidate in (str(source.path), reference):
        try:
            if read_manifest(resolve(candidate)).fingerprint == source.fingerprint:
                return candidate
        except CacheError:  # not on this node, or another cache
            continue
    if source.url is not None:
        return source.url
    raise NotFoundError(
        "a node of the Ray cluster does not have the cache",
        where=source.path,
        expected=f"fingerprint {source.fingerprint[:12]}, at this path or in the cache home",
        next_step="put the cache on a disk that all nodes share, or in an object store and name it by its URL",
    )


def sees(folder: Path, token: str) -> bool:
    """Whether this node sees the folder that has this token in it."""
    try:
        return (folder / TOKEN).read_text() == token
    except OSError:
        return False


def _wait_for_locks(folders: Sequence[Path]) -> None:
    """Wait until run folders are free: a worker of a lost node keeps them locked for a moment, until it ends too."""
    from train.runs.folder import LOCK
    from train.weights.run_files import run_files

    end = time.monotonic() + WAIT_FOR_LOCK_S
    for folder in folders:
        while run_files(folder).exists(LOCK) and time.monotonic() < end:
            try:
                with run_files(folder).lock(LOCK):
                    break
            except BlockingIOError:
                time.sleep(0.2)


@contextmanager
def _printing_to(file: Path) -> Iterator[None]:
    with open(file, "a", buffering=1) as log:
        escaped: Any = EscapedStream(log)
        with redirect_stdout(escaped), redirect_stderr(escaped):
            yield
