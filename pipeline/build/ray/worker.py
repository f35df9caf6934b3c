"""What runs in an actor of Ray: it loads the networks once, then computes, writes and commits the blocks it is given.

It writes to the store itself. The driver learns only which blocks are committed. Blocks are claimed as by any builder,
so that an actor which Ray has given up, and which still runs for a moment, never writes a block together with another.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_tools.config import Frozen
from cache_tools.console import Stopped, StopRequest
from cache_tools.errors import CacheError, RecipeError, error_to_data
from cache_tools.files import HOME_VARIABLE
from cache_tools.format.commits import BlockId
from cache_tools.images.index import use_cores
from cache_tools.system.quiet import quiet_libraries
from train.sweep.ray.worker import check_versions, folder_not_seen, sees, versions

if TYPE_CHECKING:
    from pipeline.build.cache import ReadyBuild

Answer = dict[str, Any]


class Job(Frozen):
    """What all actors of a build are given.

    Attributes:
        recipe: a `BuildRecipe` as plain data, with an absolute place for its cache, and `cpu` or `cuda` as its device.
        cpus, gpus: of each actor.
        folder, token: the folder of a cache on a disk, and the content of the file TOKEN in it; None for a URL.
        home: the cache home for a cache without a place of its own; None leaves that of the node.
        working_folder: in which the command was started; used if the node has it.
        host: on which the command was started.
        versions: of the packages that must be the same.
        arguments: of the command, for the manifest.
    """

    recipe: dict[str, Any]
    cpus: int
    gpus: float
    folder: Path | None
    token: str
    home: Path | None
    working_folder: Path
    host: str
    versions: dict[str, str]
    arguments: tuple[str, ...]


def own_cores(job: Job, resources: Mapping[str, float]) -> int:
    """Cores for torch and for decoding: of a GPU worker its share of the node, as of the GPUs."""
    if not job.gpus:
        return job.cpus
    return max(1, int(resources.get("CPU", 1.0) * job.gpus / max(resources.get("GPU", job.gpus), job.gpus)))


def rolling_is_refused(where: str) -> RecipeError:
    """The error for a cache that keeps some of its views only."""
    return RecipeError(
        "workers of Ray build whole caches, and drop no views",
        where=where,
        next_step="leave out --engine ray, or build another cache without --keep-views",
    )


class Worker:
    """Builds blocks in an actor. Its methods are called by several threads, and return errors as data.

    Args:
        job: JSON of a `Job`.
        resources: of the whole node, by Ray's names.
    """

    def __init__(self, job: str, resources: Mapping[str, float]) -> None:
        self._job = Job.model_validate_json(job)
        self._cores = own_cores(self._job, resources)
        self._may_open = threading.Event()
        self._groups: queue.SimpleQueue[list[BlockId] | None] = queue.SimpleQueue()
        self._settled: dict[BlockId, Future[int | None]] = {}
        self._request = _Stop()
        self._builder: threading.Thread | None = None
        self._error: BaseException | None = None
        self._moved: Callable[[], int] = lambda: 0

    def prepare(self) -> Answer:
        """Load everything, wait for `open_cache`, and open or create the cache.

        Returns:
            `path` and `url` of the cache, the number of its `views`, the `rows` of each block of a view, the `missing`
            blocks, how many views are built `at_once`, and the lines that a command `says`.
        """
        return self._answer(self._prepare)

    def open_cache(self) -> None:
        """Let `prepare` open the cache. One actor does before the others, and creates it."""
        self._may_open.set()

    def build(self, group: Sequence[Sequence[int]]) -> Answer:
        """Compute blocks of the same rows.

        Returns:
            `rows` that were computed here, `bytes` that this actor has moved so far, and the blocks to hand out
            `again`, because another builder had taken them over.
        """
        return self._answer(lambda: self._build([BlockId(*block) for block in group]))

    def leave(self, *, now: bool = False) -> None:
        """End the work and release all claims.

        Args:
            now: without the blocks in work.
        """
        self._request.now = self._request.now or now
        self._groups.put(None)
        if self._builder is not None:
            self._builder.join()

    def _answer(self, work: Callable[[], Answer]) -> Answer:
        try:
            return work()
        except CacheError as error:
            problem = error_to_data(error)
            if socket.gethostname() != self._job.host:
                problem["where"] = f"{problem['where'] or 'a node'}, on {socket.gethostname()}"
            return {"error": problem}

    def _prepare(self) -> Answer:
        import torch

        from cache_tools.system.memory import keep_freed_memory
        from pipeline.build.blocks import views_at_once
        from pipeline.build.cache import BuildResult, prepare_build
        from pipeline.recipe import BuildRecipe

        job = self._job
        check_versions(versions(), job.versions, socket.gethostname())
        if job.folder is not None and not sees(job.folder, job.token):
            raise folder_not_seen(job.folder.parent, [socket.gethostname()], "build")
        if job.home is not None:
            os.environ[HOME_VARIABLE] = str(job.home)
        if job.working_folder.is_dir():
            os.chdir(job.working_folder)
        sys.argv = list(job.arguments)
        keep_freed_memory()
        torch.set_num_threads(self._cores)  # Ray changes OMP_NUM_THREADS
        use_cores(self._cores)
        says: list[str] = []
        recipe = BuildRecipe.model_validate(job.recipe)
        with quiet_libraries():
            ready = prepare_build(recipe, says.append, self._may_open.wait)
        result = ready if isinstance(ready, BuildResult) else ready.result
        missing: list[BlockId] = []
        at_once = 1
        if not isinstance(ready, BuildResult):
            if result.manifest.rolling is not None:
                raise rolling_is_refused(str(result.url or result.path))
            missing = ready.missing
            identity, rows = result.manifest.recipe, result.manifest.block_rows
            at_once = recipe.views_at_once or views_at_once(identity, rows, ready.images, ready.batch_size)
            self._builder = threading.Thread(target=self._run, args=(ready,), daemon=True)
            self._builder.start()
        manifest = result.manifest
        return {
            "says": says,
            "path": str(result.path),
            "url": result.url,
            "folders": result.folders,
            "bytes": result.bytes_moved,
            "missing": [list(block) for block in missing],
            "rows": [manifest.block(block).stop - manifest.block(block).start for block in range(manifest.num_blocks)],
            "views": manifest.num_views,
            "at_once": at_once,
        }

    def _build(self, group: list[BlockId]) -> Answer:
        futures = {block: Future[int | None]() for block in group}
        self._settled |= futures
        self._groups.put(group)
        if self._error is not None and not isinstance(self._error, Stopped):  # it came before the group
            raise self._error
        rows = {block: future.result() for block, future in futures.items()}
        for block in group:
            self._settled.pop(block, None)
        return {
            "rows": sum(count or 0 for count in rows.values()),
            "bytes": self._moved(),
            "again": [list(block) for block, count in rows.items() if count is None],
        }

    def _run(self, ready: ReadyBuild) -> None:
        """The build loop, in a thread of its own."""
        from pipeline.build.blocks import build_handed

        self._moved = lambda: ready.output.bytes_moved
        try:
            with quiet_libraries():
                build_handed(
                    ready.output, ready.images, ready.ensemble, ready.batch_size,
                    self._handed(), self._settle, self._request,
                )  # fmt: skip
        except BaseException as error:
            self._error = error
            for future in list(self._settled.values()):
                if future.done():
                    continue
                if isinstance(error, Stopped):
                    future.set_result(None)
                else:
                    future.set_exception(error)

    def _handed(self) -> Iterator[list[BlockId]]:
        while True:
            try:
                group = self._groups.get(timeout=0.2)
            except queue.Empty:
                group = []
            if group is None:
                return
            yield group

    def _settle(self, block: BlockId, rows: int | None) -> None:
        self._settled[block].set_result(rows)


class _Stop(StopRequest):
    """Ends the build loop between two batches when the driver says so."""

    def __init__(self) -> None:
        super().__init__()
        self.now = False

    @property
    def pending(self) -> Stopped | None:
        return Stopped("Stopped by the command", 143) if self.now else None
