"""The build loop: every missing block of every view goes through the teachers and CLIPs once, into the cache.

Three things run at the same time: a thread loads the next images, the device computes, and a thread encodes, writes and
commits the previous block. Batches always start at the first row of their block and have the same size, so a resumed
build gives the same bytes as an uninterrupted one. Other builders may work on the same cache: the loading thread takes
the next block that nobody else has claimed.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from cache_tools.codecs import Float16
from cache_tools.console import Progress
from cache_tools.format.arrays import targets
from cache_tools.format.commits import BlockId
from cache_tools.format.manifest import Manifest
from cache_tools.images.image_set import ImageSet
from cache_tools.places.claims import Claims
from pipeline.build.output import Output
from pipeline.networks.ensemble import NetworkPixels, TeacherEnsemble, finish_pixels, load_pixels

LOADED_BATCHES_AHEAD = 3
TICK_S = 0.5


def build_blocks(output: Output, images: ImageSet, ensemble: TeacherEnsemble, batch_size: int) -> int:
    """Compute and commit all missing blocks, together with any other builders of the same cache.

    Returns:
        the number of images, (sample, view) pairs, that this builder computed.

    Raises:
        CacheError: an image cannot be decoded, numbers cannot be stored, or storage fails. Committed blocks stay, and
            other builders take over the rest.
    """
    count = 0
    with output.building():
        while missing := output.missing_blocks():  # repeats only if a builder stalled and another took over its block
            count += _build(output, missing, images, ensemble, batch_size)
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
        blocks: (view, block) of each. The loading thread takes the next one when it needs it, and may have to wait.
    """

    def __init__(
        self,
        images: ImageSet,
        manifest: Manifest,
        blocks: Iterable[tuple[int, int]],
        batch_size: int,
        *,
        pin: bool,
    ) -> None:
        self._images, self._manifest, self._blocks = images, manifest, blocks
        self._batch_size, self._pin = batch_size, pin
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
            for view, block in self._blocks:
                rows = self._manifest.block(block)
                for start in range(rows.start, rows.stop, self._batch_size):
                    stop = min(start + self._batch_size, rows.stop)
                    # A slice, so that a resident image set returns a view of its memory instead of a copy.
                    samples = np.arange(start, stop, dtype=np.int64)
                    pixels = load_pixels(self._images, self._manifest.recipe.views, slice(start, stop), samples, view)
                    if not self._put(LoadedBatch(view, block, samples, pixels.pin_memory() if self._pin else pixels)):
                        return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: LoadedBatch | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False


def _build(output: Output, missing: list[BlockId], images: ImageSet, ensemble: TeacherEnsemble, batch_size: int) -> int:
    manifest, claims, on_cuda = output.manifest, Claims(output.place), ensemble.device.type == "cuda"
    total, left = manifest.num_views * manifest.num_samples, sum(_num_rows(manifest, block) for _, block in missing)
    pending: deque[Future[int]] = deque()
    count = reported = 0
    buffers: dict[str, torch.Tensor] = {}
    with (  # exited in reverse order: claims are released after the writes, which also ends the loader's wait
        BatchLoader(images, manifest, _blocks_to_compute(output, claims, missing), batch_size, pin=on_cuda) as batches,
        claims,
        ThreadPoolExecutor(max_workers=output.store_threads, thread_name_prefix="writer") as pool,
        Progress("build", total, "images", done=total - left) as progress,
    ):
        for batch in batches:
            if batch is not None:
                rows = manifest.block(batch.block)
                if batch.samples[0] == rows.start:
                    buffers = _host_buffers(manifest, _num_rows(manifest, batch.block), ensemble.device)
                _compute(batch, manifest, ensemble, buffers)
                progress.advance(len(batch.samples), output.progress_note)
                if batch.samples[-1] + 1 == rows.stop:
                    block, copied = BlockId(batch.view, batch.block), _copy_event(ensemble.device)
                    pending.append(pool.submit(_store, output, claims, block, buffers, copied))
            while pending and (len(pending) > output.store_threads + 1 or pending[0].done()):
                count += pending.popleft().result()
            reported += _report_done_by_others(claims.done_by_others[reported:], manifest, progress)
        _report_done_by_others(claims.done_by_others[reported:], manifest, progress)
        return count + sum(future.result() for future in pending)


def _blocks_to_compute(output: Output, claims: Claims, missing: list[BlockId]) -> Iterator[BlockId]:
    """Claim the blocks to compute, one by one, in the loading thread."""
    for block in claims.share(missing, output.committed_blocks, output.is_committed):
        if output.push_from_mirror(block):
            claims.release(block)
            claims.done_by_others.append(block)
        else:
            yield block


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
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _host_buffers(manifest: Manifest, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    specs, pin = targets(manifest.recipe, manifest.block_rows), device.type == "cuda"
    dtypes = {spec.name: torch.float16 if isinstance(spec.codec, Float16) else torch.float32 for spec in specs}
    return {spec.name: torch.empty((rows, spec.width), dtype=dtypes[spec.name], pin_memory=pin) for spec in specs}


def _num_rows(manifest: Manifest, block: int) -> int:
    rows = manifest.block(block)
    return int(rows.stop - rows.start)
