"""Build a cache on the nodes of a Ray cluster. Ray is imported in another process only."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cache_tools.console import Progress, StopRequest
from cache_tools.errors import CacheError, DeviceError, RecipeError
from cache_tools.files import put_durably
from cache_tools.home import registry
from cache_tools.places import local_path, open_place
from cache_tools.places.claims import remove_dead_claims
from cache_tools.places.metadata import manifest_at
from cache_tools.system.ranks import own_rank
from cache_tools.units import counted
from pipeline.build.cache import BuildResult, stored_preflight
from pipeline.build.ray.worker import Job, rolling_is_refused
from pipeline.recipe import BuildRecipe
from train.sweep.ray import require_ray
from train.sweep.ray.engine import CONNECT_S, check_address, torch_threads
from train.sweep.ray.link import Driver
from train.sweep.ray.worker import TOKEN, versions

POLL_S = 0.5


def build_on_ray(
    recipe: BuildRecipe,
    address: str | None = None,
    *,
    workers: int | None = None,
    gpus: float = 1.0,
    say: Callable[[str], None] = lambda text: None,
) -> BuildResult:
    """Build the cache of a recipe with actors on a Ray cluster; the arrays are those of `build_cache`.

    Args:
        recipe: what to build. A place on a disk has to be one that all nodes see under this path.
        address: as for `train.sweep.ray.engine.RayEngine`.
        workers: number of actors; by default as many as the nodes have room for, also those that join later.
        gpus: per actor, if there are GPUs; 0.5 puts two actors on each.
        say: receives one line per milestone.

    Raises:
        RecipeError: Ray is not installed; several ranks, or a device with a number.
        CacheError: as `build_cache`, and as `RayEngine`.
    """
    request = StopRequest(recipe.max_minutes)
    _check(recipe, address)
    with _shared_folder(recipe) as (folder, token), _log() as log:
        driver = Driver(log, "pipeline.build.ray.driver", "committed blocks are kept")
        try:
            shared = None if folder is None else str(folder)
            driver.send({"address": address, "folder": shared, "token": token})
            nodes = driver.receive("nodes", timeout_s=CONNECT_S)
            driver.send(_job(recipe, nodes, workers, gpus, folder, token, say))
            return _follow(driver, recipe, request, say)
        finally:
            driver.close()


def _check(recipe: BuildRecipe, address: str | None) -> None:
    """Fail before Ray starts."""
    if not own_rank().is_alone:
        raise RecipeError(
            "torchrun and Ray both distribute the build",
            where="--engine ray",
            found=f"{own_rank().count} ranks",
            next_step="leave out torchrun: Ray starts a process for each GPU",
        )
    if recipe.keep_views is not None:
        raise rolling_is_refused("--keep-views")
    if recipe.device not in {"auto", "cpu", "cuda"}:
        raise DeviceError(
            "Ray chooses the device of a worker", where=f"--device {recipe.device}", expected="auto, cpu or cuda"
        )
    require_ray()
    check_address(address)
    if recipe.out is not None:
        open_place(recipe.out)


@contextmanager
def _shared_folder(recipe: BuildRecipe) -> Iterator[tuple[Path | None, str]]:
    """The folder that all nodes have to see, with a token in it that proves it; None for a cache in an object store."""
    token = uuid.uuid4().hex
    if isinstance(recipe.out, str):
        yield None, token
        return
    parent = registry.cache_home() if recipe.out is None else local_path(recipe.out).parent
    parent = Path(os.path.abspath(parent))
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ray-", dir=parent) as folder:
        put_durably(Path(folder) / TOKEN, token.encode())
        os.chmod(folder, 0o755)  # nodes may run as another user
        yield Path(folder), token


@contextmanager
def _log() -> Iterator[Path]:
    """A file for what Ray prints. It stays if an error refers to it."""
    descriptor, name = tempfile.mkstemp(prefix="build-on-ray-", suffix=".log")
    os.close(descriptor)
    stays = False
    try:
        yield Path(name)
    except CacheError as error:
        stays = error.where == Path(name)
        raise
    finally:
        if not stays:
            with suppress(OSError):
                os.unlink(name)


def _job(
    recipe: BuildRecipe,
    nodes: list[dict[str, Any]],
    workers: int | None,
    gpus: float,
    folder: Path | None,
    token: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The message that starts the build."""
    has_gpus = any(node["gpus"] > 0 for node in nodes)
    uses_gpus = recipe.device == "cuda" or (recipe.device == "auto" and has_gpus)
    gpus = gpus if uses_gpus else 0.0
    cpus = 1 if uses_gpus else torch_threads()  # a GPU worker takes its share of the cores of whatever node it is on
    room = sum(int(min(node["cpus"] // cpus, node["gpus"] / gpus if gpus else node["cpus"])) for node in nodes)
    each = f"{gpus:g} GPUs" if gpus else f"{cpus:g} CPUs"
    if workers is None and room == 0:
        raise DeviceError(
            "no node of the Ray cluster has room for a worker",
            where=", ".join(f"{node['host']}: {node['cpus']:g} CPUs, {node['gpus']:g} GPUs" for node in nodes),
            expected=each,
            next_step="lower OMP_NUM_THREADS, or give --ray-workers if the cluster grows by itself",
        )
    say(f"Ray: {counted(len(nodes), 'node')}, {counted(workers or room, 'worker')} with {each} each")
    out = (
        recipe.out
        if isinstance(recipe.out, str) or recipe.out is None
        else Path(os.path.abspath(local_path(recipe.out)))
    )
    changes = {"out": out, "dataset": recipe.dataset.absolute(), "device": "cuda" if uses_gpus else "cpu"}
    job = Job(
        recipe=recipe.model_copy(update=changes).model_dump(mode="json"),
        cpus=cpus,
        gpus=gpus,
        folder=folder,
        token=token,
        home=Path(os.path.abspath(registry.cache_home())) if recipe.out is None else None,
        working_folder=Path.cwd(),
        host=socket.gethostname(),
        versions=versions(),
        arguments=tuple(sys.argv),
    )
    return {"job": job.model_dump_json(), "cpus": cpus, "gpus": gpus, "workers": workers}


def _follow(driver: Driver, recipe: BuildRecipe, request: StopRequest, say: Callable[[str], None]) -> BuildResult:
    """Show the progress until the cache is complete."""

    def next_event() -> dict[str, Any]:
        while (event := driver.next_event(POLL_S)) is None:
            if (stopped := request.pending) is not None:
                raise stopped
        return event

    ready = next_event()["ready"]
    for line in ready["says"]:
        say(line)
    place = open_place(ready["url"] or ready["path"])
    start, images = time.monotonic(), 0
    if ready["done"] < ready["total"]:
        with Progress("build", ready["total"], "images", done=ready["done"]) as progress:
            while "rows" in (event := next_event()):
                images += event["rows"]
                note = f"{event['bytes'] / 1e6:,.1f} MB moved, " if ready["url"] else ""
                progress.advance(event["rows"], f"{note}{counted(event['workers'], 'worker')}")
                if (stopped := request.pending) is not None:
                    raise stopped
    else:
        event = next_event()
    elapsed_s, moved = time.monotonic() - start, event["built"]["bytes"]
    remove_dead_claims(place)
    manifest = manifest_at(place)
    return BuildResult(
        Path(ready["path"]),
        ready["url"],
        manifest,
        stored_preflight(manifest),
        images,
        elapsed_s,
        moved,
        ready["folders"],
    )
