"""What runs on the nodes of a Ray cluster: a look at the node, and the training of a share of a sweep's trials.

Everything comes as plain data, and errors go back as plain data: nobody unpickles an exception.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_tools import errors
from cache_tools.config import Frozen
from cache_tools.errors import CacheError, NotFoundError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from train.sweep.recipe import Trial

PACKAGES = ("teacher-cache", "torch", "ray")
TOKEN = "token"
PATIENCE_S = 60.0


class KnownCache(Frozen):
    """A cache on a disk of the machine that started the sweep: what another must have, to have it too.

    Attributes:
        path: absolute.
        url: of the remote cache that it is a mirror of.
    """

    path: Path
    fingerprint: str
    url: str | None = None


class Share(Frozen):
    """Trials of one batch stream, to be trained in one worker.

    Attributes:
        trials: `Trial`s as plain data; all their paths are absolute.
        contest: `Contest` as plain data.
        threads: of torch.
        folder: of Ray's part in the sweep's folder; `token` is what the file TOKEN in it says.
        log: for what is printed, in that folder.
        working_folder: where the sweep was started; taken where the node has it.
        host: where the sweep was started.
        caches: by what recipes call them.
    """

    trials: tuple[dict[str, Any], ...]
    contest: dict[str, Any] | None
    threads: int
    folder: Path
    token: str
    log: str
    working_folder: Path
    host: str
    caches: dict[str, KnownCache]


def probe(folder: str, token: str) -> dict[str, Any]:
    """A node's name, the versions that results depend on, and whether it sees the sweep's folder."""
    return {"host": socket.gethostname(), "versions": versions(), "sees": _reads(Path(folder), token)}


def versions() -> dict[str, str]:
    """Of the packages that a node must have in common with the machine that starts a sweep."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def train_share(config: Mapping[str, Any], *, shares: Sequence[str]) -> None:
    """A Tune trial: trains the share with the number `config["share"]`, and reports the error that concerns all."""
    from ray import tune

    share = Share.model_validate_json(shares[config["share"]])
    try:
        _train(share)
        problem = None
    except CacheError as error:
        problem = as_data(error)
        if socket.gethostname() != share.host:
            problem["where"] = f"{problem['where'] or 'a node'}, on {socket.gethostname()}"
    tune.report({"error": "" if problem is None else json.dumps(problem)})


def as_data(error: CacheError) -> dict[str, str | None]:
    """An error as plain data."""
    parts = {part: getattr(error, part) for part in ("what", "where", "expected", "found", "next_step")}
    return {"kind": type(error).__name__, **{key: None if part is None else str(part) for key, part in parts.items()}}


def from_data(data: Mapping[str, Any]) -> CacheError:
    """The error that `as_data` was given."""
    known = {key: data.get(key) for key in ("where", "expected", "found", "next_step")}
    return getattr(errors, str(data["kind"]), StorageError)(data["what"], **known)


def unseen(folder: Path, hosts: Iterable[str]) -> StorageError:
    """The error of nodes that do not see the sweep's folder."""
    return StorageError(
        "nodes of the Ray cluster do not see the folder of the sweep",
        where=folder,
        expected="the same folder under the same path on every node",
        found=f"not on {', '.join(sorted(set(hosts)))}",
        next_step="choose an --out on a disk that all nodes share",
    )


def _train(share: Share) -> None:
    if not _reads(share.folder, share.token):
        raise unseen(share.folder.parent, [socket.gethostname()])
    with _printing_to(share.folder / share.log):
        import torch

        from cache_tools.memory import keep_freed_memory
        from train.sweep.halving import Contest
        from train.sweep.recipe import Trial
        from train.sweep.streams import opener, train_stream

        os.chdir(share.working_folder if share.working_folder.is_dir() else share.folder.parent)
        keep_freed_memory()
        torch.set_num_threads(share.threads)  # Ray sets OMP_NUM_THREADS to what it likes
        trials = [_with_cache(Trial.model_validate(trial), share.caches) for trial in share.trials]
        contest = None if share.contest is None else Contest.model_validate(share.contest)
        _wait_for_the_dead([trial.folder for trial in trials])
        train_stream(trials, contest=contest, images_of=opener())


def _with_cache(trial: Trial, caches: Mapping[str, KnownCache]) -> Trial:
    """A trial whose cache this node finds: a folder with the same cache in it, or a URL."""
    name = trial.recipe.cache
    if name is None or name not in caches:
        return trial
    reference = _found_here(name, caches[name])
    return trial.model_copy(update={"recipe": trial.recipe.model_copy(update={"cache": reference})})


def _found_here(reference: str, known: KnownCache) -> str:
    from cache_tools.home.registry import resolve
    from cache_tools.store.group import read_manifest

    for candidate in (str(known.path), reference):
        try:
            if read_manifest(resolve(candidate)).fingerprint == known.fingerprint:
                return candidate
        except CacheError:  # not here, or something else of that name
            continue
    if known.url is not None:
        return known.url
    raise NotFoundError(
        "a node of the Ray cluster does not have the cache",
        where=known.path,
        expected=f"fingerprint {known.fingerprint[:12]}, there or in the cache home",
        next_step="put the cache on a disk that all nodes share, or in an object store and name it by its URL",
    )


def _reads(folder: Path, token: str) -> bool:
    try:
        return (folder / TOKEN).read_text() == token
    except OSError:
        return False


def _wait_for_the_dead(folders: Sequence[Path]) -> None:
    """A worker whose node was lost ends a moment after it; until then it holds its run folders."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    end = time.monotonic() + PATIENCE_S
    for folder in folders:
        while (folder / ".lock").exists() and time.monotonic() < end:
            with open(folder / ".lock", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
                        break  # a file system without locks
            time.sleep(0.2)


@contextmanager
def _printing_to(file: Path) -> Iterator[None]:
    with open(file, "a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        yield
