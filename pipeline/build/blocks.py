"""The build loop: every missing block of every view through the teachers and CLIPs, once, into the cache.

Three things happen at the same time: a thread loads the next images, the device computes, and a thread encodes,
writes and commits the block before. A block is always computed from its own first row in batches of the same size,
so a resumed build gives the same bytes as an uninterrupted one. Other builders may be at work on the same cache: the
loading thread takes the next block that nobody else has.
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
from pipeline.networks.ensemble import TeacherEnsemble


def build_blocks(output: Output, images: ImageSet, ensemble: TeacherEnsemble, batch_size: int) -> int:
    """Have every block committed, by this builder or by others at work on the same cache.

    Returns:
        how many images, (sample, view) pairs, were computed here.

    Raises:
        CacheError: an image that cannot be decoded, numbers that cannot be stored, trouble with storage. What is
            committed stays, and other builders take over what is not.
    """
    count = 0
    with output.working():
        while missing := output.missing():  # again only if a block was taken from a builder that stood still
            count += _build(output, missing, images, ensemble, batch_size)
    return count


def _build(output: Output, missing: list[BlockId], images: ImageSet, ensemble: TeacherEnsemble, batch_size: int) -> int:
    manifest, claims, on_cuda = output.manifest, Claims(output.place), ensemble.device.type == "cuda"
    total, left = manifest.num_views * manifest.num_samples, sum(_rows(manifest, block) for _, block in missing)
    pending: deque[Future[int]] = deque()
    count = noticed = 0
    buffers: dict[str, torch.Tensor] = {}
    with (  # left from the last to the first: claims are given up after the writes, and end the loader's wait
        BatchLoader(images, manifest, _shared(output, claims, missing), batch_size, pin=on_cuda) as batches,
        claims,
        ThreadPoolExecutor(max_workers=output.writers, thread_name_prefix="writer") as pool,
        Progress("build", total, "images", done=total - left) as progress,
    ):
        for batch in batches:
            if batch is not None:
                rows = manifest.block(batch.block)
                if batch.samples[0] == rows.start:
                    buffers = _host_buffers(manifest, rows.stop - rows.start, ensemble.device)
                _compute(batch, manifest, ensemble, buffers)
                progress.advance(len(batch.samples), output.note)
                if batch.samples[-1] + 1 == rows.stop:
                    block = BlockId(batch.view, batch.block)
                    pending.append(pool.submit(_store, output, claims, block, buffers, _copied(ensemble.device)))
            while pending and (len(pending) > output.writers + 1 or pending[0].done()):
                count += pending.popleft().result()
            noticed += _count_elsewhere(claims.done_by_others[noticed:], manifest, progress)
        _count_elsewhere(claims.done_by_others[noticed:], manifest, progress)
        return count + sum(future.result() for future in pending)


def _count_elsewhere(blocks: list[BlockId], manifest: Manifest, progress: Progress) -> int:
    """Add what others have finished to the progress; gives how many blocks that is."""
    progress.advance(sum(_rows(manifest, block) for _, block in blocks))
    return len(blocks)


def _compute(
    batch: LoadedBatch, manifest: Manifest, ensemble: TeacherEnsemble, buffers: dict[str, torch.Tensor]
) -> None:
    """A batch through the networks, and its rows into the buffers of its block."""
    pixels = batch.pixels.to(ensemble.device, non_blocking=True)
    views = manifest.recipe.views.apply(pixels, batch.samples, batch.view)
    start = int(batch.samples[0]) - manifest.block(batch.block).start
    for name, values in ensemble.targets(views, manifest.recipe.store).items():
        # Converted on the device, so that half-precision rows cross the bus at half the bytes.
        target = buffers[name][start : start + len(batch.samples)]
        target.copy_(values.to(target.dtype), non_blocking=True)


def _shared(output: Output, claims: Claims, missing: list[BlockId]) -> Iterator[BlockId]:
    """The blocks to compute here; runs in the loading thread."""
    for block in claims.share(missing, output.committed, output.is_committed):
        if output.at_hand(block):
            claims.release(block)
            claims.done_by_others.append(block)
        else:
            yield block


def _store(
    output: Output, claims: Claims, block: BlockId, buffers: dict[str, torch.Tensor], copied: torch.cuda.Event | None
) -> int:
    """Write and commit a block, then give its claim up; runs in a writing thread. Gives the rows that were stored."""
    if copied is not None:
        copied.synchronize()
    manifest = output.manifest
    rows = manifest.block(block.block)
    digest = manifest.recipe.views.parameter_digest(
        np.arange(rows.start, rows.stop), block.view, manifest.recipe.dataset.image_size
    )
    held = claims.holds(block)
    if held:  # else this builder stood still for so long that another took the block over
        output.store(block, {name: buffer.numpy() for name, buffer in buffers.items()}, digest)
    claims.release(block)
    return rows.stop - rows.start if held else 0


def _copied(device: torch.device) -> torch.cuda.Event | None:
    """An event behind the block's last copy to the host; None where copies are immediate."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _host_buffers(manifest: Manifest, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    specs, pin = targets(manifest.recipe, manifest.block_rows), device.type == "cuda"
    dtypes = {spec.name: torch.float16 if isinstance(spec.codec, Float16) else torch.float32 for spec in specs}
    return {spec.name: torch.empty((rows, spec.width), dtype=dtypes[spec.name], pin_memory=pin) for spec in specs}


def _rows(manifest: Manifest, block: int) -> int:
    rows = manifest.block(block)
    return rows.stop - rows.start


LOADED_BATCHES_AHEAD = 3
TICK_S = 0.5


class LoadedBatch(NamedTuple):
    """A batch of one block: its samples, int64 [B], and their canvases, uint8 [B, 3, H, W]."""

    view: int
    block: int
    samples: np.ndarray
    pixels: torch.Tensor


class BatchLoader:
    """Decoded batches of blocks, block by block in the order in which they are handed out.

    Args:
        blocks: (view, block) of each. The loading thread asks for the next when it needs it, and may have to wait.
    """

    def __init__(
        self,
        images: ImageSet,
        manifest: Manifest,
        blocks: Iterable[BlockId],
        batch_size: int,
        *,
        pin: bool,
    ) -> None:
        self._images, self._manifest, self._blocks = images, manifest, blocks
        self._batch_size, self._pin = batch_size, pin
        # None stands for the end.
        self._queue: queue.Queue[LoadedBatch | BaseException | None] = queue.Queue(LOADED_BATCHES_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)

    def __enter__(self) -> Iterator[LoadedBatch | None]:
        """Batches as they come; None twice a second while there is none."""
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
                    # A slice where possible: a resident set then hands out a view of its memory, without a copy.
                    pixels = torch.from_numpy(self._images.load(slice(start, stop)))
                    samples = np.arange(start, stop, dtype=np.int64)
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
