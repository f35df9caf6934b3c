"""The build loop: every missing block of every view through the teachers and CLIPs, once, into the cache.

Three things happen at the same time: a thread loads the next images, the device computes, and a thread encodes,
writes and commits the block before. A block is always computed from its own first row in batches of the same size,
so a resumed build gives the same bytes as an uninterrupted one. Other builders may be at work on the same cache: the
loading thread takes the next block that nobody else has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from cache_tools.arrays import targets
from cache_tools.claims import Claims
from cache_tools.codecs import Float16
from cache_tools.console import Progress
from cache_tools.image_set import ImageSet
from cache_tools.manifest import Manifest
from pipeline.loader import BatchLoader, LoadedBatch
from pipeline.output import Output
from pipeline.targets import TeacherPair

Pair = tuple[int, int]


def build_blocks(output: Output, images: ImageSet, pair: TeacherPair, batch_size: int) -> int:
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
            count += _build(output, missing, images, pair, batch_size)
    return count


def _build(output: Output, missing: list[Pair], images: ImageSet, pair: TeacherPair, batch_size: int) -> int:
    manifest, claims, on_cuda = output.manifest, Claims(output.place), pair.device.type == "cuda"
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
                    buffers = _host_buffers(manifest, rows.stop - rows.start, pair.device)
                _compute(batch, manifest, pair, buffers)
                progress.advance(len(batch.samples), output.note)
                if batch.samples[-1] + 1 == rows.stop:
                    block = (batch.view, batch.block)
                    pending.append(pool.submit(_store, output, claims, block, buffers, _copied(pair.device)))
            while pending and (len(pending) > output.writers + 1 or pending[0].done()):
                count += pending.popleft().result()
            noticed += _count_elsewhere(claims.elsewhere[noticed:], manifest, progress)
        _count_elsewhere(claims.elsewhere[noticed:], manifest, progress)
        return count + sum(future.result() for future in pending)


def _count_elsewhere(pairs: list[Pair], manifest: Manifest, progress: Progress) -> int:
    """Add what others have finished to the progress; gives how many blocks that is."""
    progress.advance(sum(_rows(manifest, block) for _, block in pairs))
    return len(pairs)


def _compute(batch: LoadedBatch, manifest: Manifest, pair: TeacherPair, buffers: dict[str, torch.Tensor]) -> None:
    """A batch through the networks, and its rows into the buffers of its block."""
    pixels = batch.pixels.to(pair.device, non_blocking=True)
    views = manifest.recipe.views.apply(pixels, batch.samples, batch.view)
    start = int(batch.samples[0]) - manifest.block(batch.block).start
    for name, values in pair.targets(views, manifest.recipe.store).items():
        # Converted on the device, so that half-precision rows cross the bus at half the bytes.
        target = buffers[name][start : start + len(batch.samples)]
        target.copy_(values.to(target.dtype), non_blocking=True)


def _shared(output: Output, claims: Claims, missing: list[Pair]) -> Iterator[Pair]:
    """The blocks to compute here; runs in the loading thread."""
    for pair in claims.share(missing, output.committed, output.is_committed):
        if output.at_hand(pair):
            claims.release(pair)
            claims.elsewhere.append(pair)
        else:
            yield pair


def _store(
    output: Output, claims: Claims, pair: Pair, buffers: dict[str, torch.Tensor], copied: torch.cuda.Event | None
) -> int:
    """Write and commit a block, then give its claim up; runs in a writing thread. Gives the rows that were stored."""
    if copied is not None:
        copied.synchronize()
    manifest, (view, block) = output.manifest, pair
    rows = manifest.block(block)
    digest = manifest.recipe.views.parameter_digest(
        np.arange(rows.start, rows.stop), view, manifest.recipe.dataset.image_size
    )
    held = claims.holds(pair)
    if held:  # else this builder stood still for so long that another took the block over
        output.store(pair, {name: buffer.numpy() for name, buffer in buffers.items()}, digest)
    claims.release(pair)
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
