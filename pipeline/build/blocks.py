"""The build loop: every missing block of every view goes through the teachers and CLIPs once, into the cache.

Three things run at the same time: a thread loads the next images, the device computes, and a thread encodes, writes and
commits the previous block. Batches always start at the first row of their block and have the same size, so a resumed
build gives the same bytes as an uninterrupted one. Other builders may work on the same cache: the loading thread takes
the next blocks that nobody else has claimed.

Images that are decoded are decoded once for all missing views of their rows: the loading thread takes these blocks
together, and loads every batch for all of them. Each block is still committed on its own. A group has up to
MAX_VIEWS_AT_ONCE views, and fewer where their pixels and targets would take more than GROUP_BYTES. Images in memory
cost nothing to load again, so their views are built one after the other. `views_at_once` of the recipe sets another
number: with fewer, the first views are complete earlier, for students that follow the build.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from cache_tools.codecs import Float16
from cache_tools.console import Progress, StopRequest
from cache_tools.decoding.service import DecodeService, service_for
from cache_tools.format.arrays import targets
from cache_tools.format.commits import BlockId
from cache_tools.format.manifest import Manifest
from cache_tools.format.recipe import CacheRecipe
from cache_tools.images.image_set import ImageSet
from cache_tools.places.claims import Claims
from cache_tools.places.leases import LEASE_S
from cache_tools.system.memory import raise_on_out_of_memory
from cache_tools.units import counted
from pipeline.build.output import Output
from pipeline.build.rolling import RollingBuild
from pipeline.networks.ensemble import NETWORKS, NetworkPixels, TeacherEnsemble, finish_pixels, start_loading_pixels
from pipeline.recipe import MAX_VIEWS_AT_ONCE

LOADED_BATCHES_AHEAD = 3
TICK_S = 0.5
GROUP_BYTES = 2 << 30


def build_blocks(
    output: Output,
    images: ImageSet,
    ensemble: TeacherEnsemble,
    batch_size: int,
    at_once: int | None = None,
    request: StopRequest | None = None,
    lease_s: float = LEASE_S,
) -> int:
    """Compute and commit all missing blocks, together with any other builders of the same cache.

    Args:
        at_once: number of views that are built together; None to choose it.
        lease_s: of a rolling cache: for how long a student that does not renew its lease is waited for.
        request: its limit of time ends the build between two batches.

    Returns:
        the number of images, (sample, view) pairs, that this builder computed.

    Raises:
        CacheError: an image cannot be decoded, numbers cannot be stored, or storage fails. Committed blocks stay, and
            other builders take over the rest.
    """
    count = 0
    with output.building():
        while missing := output.missing_blocks():  # repeats only if a builder stalled and another took over its block
            count += _build(output, missing, images, ensemble, batch_size, at_once, request, lease_s)
    return count


class LoadedBatch(NamedTuple):
    """A batch of one block: its samples, int64 [B], and their canvases or crops, on the CPU."""

    view: int
    block: int
    samples: np.ndarray
    pixels: NetworkPixels


class BatchLoader:
    """Loads the batches of blocks in a thread, a few batches ahead.

    Args:
        groups: blocks of the same rows, whose images are loaded once for all of them. The loading thread takes the next
            group when it needs it, and may have to wait.
        service: the processes that decode; None for threads.
    """

    def __init__(
        self,
        images: ImageSet,
        manifest: Manifest,
        groups: Iterable[Sequence[BlockId]],
        batch_size: int,
        *,
        pin: bool,
        service: DecodeService | None = None,
    ) -> None:
        self._images, self._manifest, self._groups = images, manifest, groups
        self._batch_size, self._pin, self._service = batch_size, pin, service
        # None marks the end.
        self._queue: queue.Queue[LoadedBatch | BaseException | None] = queue.Queue(LOADED_BATCHES_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)

    def __enter__(self) -> Iterator[LoadedBatch | None]:
        """Batches in order; None twice a second while none is ready."""
        self._thread.start()
        return self._batches()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _batches(self) -> Iterator[LoadedBatch | None]:
        while True:
            try:
                item = self._queue.get(timeout=TICK_S)
            except queue.Empty:
                yield None
                continue
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item

    def _run(self) -> None:
        try:
            for group in self._groups:
                ready: deque[Callable[[], list[LoadedBatch]]] = deque()
                rows = self._manifest.block(group[0].block)
                for start in range(rows.start, rows.stop, self._batch_size):
                    samples = np.arange(start, min(start + self._batch_size, rows.stop), dtype=np.int64)
                    ready.append(self._start(samples, group))  # processes decode it during the wait for the one before
                    if len(ready) > 1 and not self._put_all(ready.popleft()()):
                        return
                if not self._put_all(ready.popleft()()):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _start(self, samples: np.ndarray, group: Sequence[BlockId]) -> Callable[[], list[LoadedBatch]]:
        """Begin to load consecutive samples for each block of a group; call the result to wait for them."""
        # A slice, so that a resident image set returns a view of its memory instead of a copy.
        rows = slice(int(samples[0]), int(samples[-1]) + 1)
        views = self._manifest.recipe.views
        numbers = [block.view for block in group]
        load = start_loading_pixels(self._service, self._images, views, rows, samples, numbers, pin=self._pin)
        return lambda: [
            LoadedBatch(block.view, block.block, samples, pixels) for block, pixels in zip(group, load(), strict=True)
        ]

    def _put_all(self, batches: Sequence[LoadedBatch]) -> bool:
        return all(self._put(batch) for batch in batches)

    def _put(self, item: LoadedBatch | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False


def build_handed(
    output: Output,
    images: ImageSet,
    ensemble: TeacherEnsemble,
    batch_size: int,
    handed: Iterable[Sequence[BlockId]],
    settled: Callable[[BlockId, int | None], None],
    request: StopRequest,
) -> None:
    """Compute and commit the blocks that something else hands out, until it hands out no more.

    Args:
        handed: groups of blocks of the same rows, and now and then an empty one where there is none yet. The loading
            thread takes the next one when it needs it.
        settled: called with each of the blocks and the number of its rows that were computed here: 0 if others had
            committed it, None if another builder took it over and has not committed it yet. Called by several threads.

    Raises:
        CacheError: as `build_blocks`.
    """
    claims = Claims(output.place)

    def groups() -> Iterator[Sequence[BlockId]]:
        for group in handed:
            if claims.are_released:  # this builder has failed
                return
            if not group:
                continue
            left = list(group)

            def committed(group: Sequence[BlockId] = left) -> set[BlockId]:
                return {block for block in group if output.is_committed(block)}

            ours: set[BlockId] = set()
            for part in _groups_to_compute(output, claims, left, len(left), list_committed=committed):
                ours |= set(part)
                yield part
            for block in left:
                if block not in ours:
                    settled(block, 0)
        list(claims.share((), output.committed_blocks, output.is_committed))  # whose claims are leftovers

    def store(block: BlockId, rows: int) -> None:
        settled(block, rows or None)

    with output.building():
        _compute_groups(
            output, claims, groups(), images, ensemble, batch_size, len(images), request=request, on_block=store
        )


def _build(
    output: Output,
    missing: list[BlockId],
    images: ImageSet,
    ensemble: TeacherEnsemble,
    batch_size: int,
    at_once: int | None,
    request: StopRequest | None,
    lease_s: float,
) -> int:
    manifest, claims = output.manifest, Claims(output.place)
    total, left = manifest.num_views * manifest.num_samples, sum(_num_rows(manifest, block) for _, block in missing)
    count = reported = 0
    given, rolling = at_once, None
    at_once = given or views_at_once(manifest.recipe, manifest.block_rows, images, batch_size)
    if manifest.rolling is not None:  # by default half of the views, so that students train on the others meanwhile
        at_once = min(at_once, manifest.rolling.keep if given else max(manifest.rolling.keep // 2, 1))
        rolling = RollingBuild(output, lease_s)
    groups = _groups_to_compute(output, claims, missing, at_once, rolling)
    pictures = sum(_num_rows(manifest, block) for block in {block for _, block in missing})

    def on_batch(samples: int) -> None:
        nonlocal reported
        if samples:
            progress.advance(samples, output.progress_note)
        reported += _report_done_by_others(claims.done_by_others[reported:], manifest, progress)

    def on_block(block: BlockId, rows: int) -> None:
        nonlocal count
        count += rows

    with Progress("build", total, "images", done=total - left) as progress:
        _compute_groups(
            output, claims, groups, images, ensemble, batch_size, pictures,
            request=request, on_batch=on_batch, on_block=on_block,
        )  # fmt: skip
        on_batch(0)
    return count


def _compute_groups(
    output: Output,
    claims: Claims,
    groups: Iterable[Sequence[BlockId]],
    images: ImageSet,
    ensemble: TeacherEnsemble,
    batch_size: int,
    pictures: int,
    *,
    request: StopRequest | None,
    on_batch: Callable[[int], None] = lambda samples: None,
    on_block: Callable[[BlockId, int], None],
) -> None:
    """Compute and commit groups of claimed blocks.

    Args:
        pictures: so many are loaded in all, about.
        on_batch: called with the number of samples of each computed batch, and with 0 twice a second without one.
        on_block: called with each block, and the number of its rows that were stored.
    """
    manifest, on_cuda = output.manifest, ensemble.device.type == "cuda"
    pending: deque[tuple[BlockId, Future[int]]] = deque()
    buffers: dict[BlockId, dict[str, torch.Tensor]] = {}
    service = service_for(images, pictures)
    with (  # exited in reverse order: claims are released after the writes, which also ends the loader's wait
        BatchLoader(images, manifest, groups, batch_size, pin=on_cuda, service=service) as batches,
        claims,
        ThreadPoolExecutor(max_workers=output.store_threads, thread_name_prefix="writer") as pool,
    ):
        for batch in batches:
            if request is not None and (stopped := request.pending) is not None:
                raise stopped
            if batch is not None:
                rows, block = manifest.block(batch.block), BlockId(batch.view, batch.block)
                if batch.samples[0] == rows.start:
                    buffers[block] = _host_buffers(manifest, _num_rows(manifest, batch.block), ensemble.device)
                with raise_on_out_of_memory(*_about_memory(ensemble.device, batch_size)):
                    _compute(batch, manifest, ensemble, buffers[block])
                if batch.samples[-1] + 1 == rows.stop:
                    copied = _copy_event(ensemble.device)
                    pending.append((block, pool.submit(_store, output, claims, block, buffers.pop(block), copied)))
            on_batch(0 if batch is None else len(batch.samples))
            while pending and (len(pending) > output.store_threads + 1 or pending[0][1].done()):
                block, future = pending.popleft()
                on_block(block, future.result())
        for block, future in pending:
            on_block(block, future.result())


def views_at_once(recipe: CacheRecipe, block_rows: int, images: ImageSet, batch_size: int) -> int:
    """How many views of the same rows are built together: see the module's docstring."""
    if images.resident:
        return 1
    views, pixels = recipe.views, 0
    if views.box_op is not None or views.mix is not None:  # else all views share the canvases
        sizes = {views.seen_by(network).crop_size or images.image_size for network in NETWORKS}
        pixels = sum(3 * height * width for height, width in sizes) * batch_size * (1 if views.mix is None else 2)
    targets_bytes = sum(4 * spec.width for spec in targets(recipe, block_rows)) * block_rows
    # Two batches in the memory of the decoding processes and two here; the blocks that are filled, and those written.
    return min(max(GROUP_BYTES // (4 * pixels + 2 * targets_bytes), 1), MAX_VIEWS_AT_ONCE)


def in_build_order(missing: Iterable[BlockId], at_once: int) -> list[BlockId]:
    """The first `at_once` views of all rows, then the next: every view is complete as early as can be."""
    return sorted(missing, key=lambda block: (block.view // at_once, block.block, block.view))


def _groups_to_compute(
    output: Output,
    claims: Claims,
    missing: list[BlockId],
    at_once: int,
    rolling: RollingBuild | None = None,
    list_committed: Callable[[], set[BlockId]] | None = None,
) -> Iterator[Sequence[BlockId]]:
    """Claim the blocks to compute, group by group, in the loading thread."""
    parts: Iterable[list[BlockId]] = [missing]
    if rolling is not None:
        claims.prevent_pruning()  # also while it waits, and holds no other claim
        parts = rolling.parts(missing, at_once, claims.wait)
    committed = list_committed or output.committed_blocks
    for part in parts:
        ordered = in_build_order(part, at_once)
        for group in claims.share_groups(ordered, committed, output.is_committed, at_once=at_once):
            left = []
            for block in group:
                if output.push_from_mirror(block):
                    claims.release(block)
                    claims.done_by_others.append(block)
                else:
                    left.append(block)
            if left:
                yield left


def _compute(
    batch: LoadedBatch, manifest: Manifest, ensemble: TeacherEnsemble, buffers: dict[str, torch.Tensor]
) -> None:
    """Run a batch through the networks and copy its rows into the buffers of its block."""
    pixels = batch.pixels.to(ensemble.device)
    views = finish_pixels(pixels, manifest.recipe.views, batch.samples, batch.view)
    start = int(batch.samples[0]) - manifest.block(batch.block).start
    for name, values in ensemble.targets(views.teacher, manifest.recipe.store, views.clip).items():
        # Converted on the device, so that half-precision rows cross the bus at half the bytes.
        target = buffers[name][start : start + len(batch.samples)]
        target.copy_(values.to(target.dtype), non_blocking=True)


def _about_memory(device: torch.device, batch_size: int) -> tuple[str, str]:
    """Where memory runs out, and what to do about it."""
    where = f"a batch of {counted(batch_size, 'image')} on {device}"
    if batch_size == 1:
        return where, "build where there is more memory"
    return where, f"continue with --batch-size {batch_size // 2} (targets may differ in their last bits), or elsewhere"


def _store(
    output: Output, claims: Claims, block: BlockId, buffers: dict[str, torch.Tensor], copied: torch.cuda.Event | None
) -> int:
    """Write and commit a block and release its claim, in a writing thread. Returns the number of rows stored."""
    if copied is not None:
        copied.synchronize()
    manifest = output.manifest
    rows = manifest.block(block.block)
    digest = manifest.recipe.views.parameter_digest(
        np.arange(rows.start, rows.stop), block.view, manifest.recipe.dataset.image_size
    )
    held = claims.holds(block)
    if held:  # not held if this builder stalled for so long that another took the block over
        output.store(block, {name: buffer.numpy() for name, buffer in buffers.items()}, digest)
    claims.release(block)
    return _num_rows(manifest, block.block) if held else 0


def _report_done_by_others(blocks: list[BlockId], manifest: Manifest, progress: Progress) -> int:
    """Advance the progress by blocks that others have finished. Returns the number of blocks."""
    progress.advance(sum(_num_rows(manifest, block) for _, block in blocks))
    return len(blocks)


def _copy_event(device: torch.device) -> torch.cuda.Event | None:
    """An event behind the block's last copy to the host; None on a CPU, where copies are synchronous."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # the thread that waits for it sleeps
    event.record(torch.cuda.current_stream(device))
    return event


def _host_buffers(manifest: Manifest, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    specs, pin = targets(manifest.recipe, manifest.block_rows), device.type == "cuda"
    dtypes = {spec.name: torch.float16 if isinstance(spec.codec, Float16) else torch.float32 for spec in specs}
    return {spec.name: torch.empty((rows, spec.width), dtype=dtypes[spec.name], pin_memory=pin) for spec in specs}


def _num_rows(manifest: Manifest, block: int) -> int:
    rows = manifest.block(block)
    return int(rows.stop - rows.start)
