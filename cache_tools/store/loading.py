"""Read blocks of one view of one array into host memory; an error names the damaged block."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from zarr.buffer.cpu import NDBuffer

from cache_tools.errors import FormatError, StorageError, UnsafeFileError
from cache_tools.format import commits
from cache_tools.format.arrays import ArraySpec
from cache_tools.format.manifest import Manifest
from cache_tools.store.group import check_chunks, damaged_block_error, translate_errors


def load_array(
    array: zarr.Array[Any],
    spec: ArraySpec,
    manifest: Manifest,
    path: Path,
    view: int,
    blocks: Sequence[int],
    digests: Sequence[int] | None,
    *,
    pin: bool = False,
) -> torch.Tensor:
    """Read committed blocks of a view, one after the other in one tensor [rows, width] as stored.

    Blocks are read and compared in threads; a chunk is decompressed straight into the tensor's memory.

    Args:
        path: folder of the cache.
        blocks: numbers of the blocks, in the order of the tensor.
        digests: the digest of each of them in the commits, to compare with; None skips the comparison. Missing and
            damaged files are found either way, the latter by the crc32c of each chunk.
        pin: use page-locked memory, for asynchronous copies to CUDA.

    Raises:
        FormatError: rows are damaged, missing or not those committed; names the block and how to compute it again.
        StorageError: the disk cannot be read, or the blocks do not fit into memory.
    """
    places = [manifest.block(block) for block in blocks]
    for place in places:
        check_chunks(spec, manifest, path, view, place.start, place.stop)
    ends = list(accumulate(place.stop - place.start for place in places))
    tensor = _allocate((ends[-1] if ends else 0, spec.width), getattr(torch, spec.dtype), pin, path / spec.name)
    values = tensor.numpy()

    def read(number: int) -> None:
        place, stop = places[number], ends[number]
        rows = values[stop - (place.stop - place.start) : stop]
        _read_block(array, spec, manifest, path, view, blocks[number], rows)
        if digests is not None and commits.block_digest(rows) != digests[number]:
            what = "stored rows are not those that were committed"
            raise damaged_block_error(what, path, spec, manifest, view, place.start)

    # Decompressing and hashing release the interpreter lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(read, number) for number in range(len(blocks))]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return tensor


def _read_block(
    array: zarr.Array[Any],
    spec: ArraySpec,
    manifest: Manifest,
    path: Path,
    view: int,
    block: int,
    rows: npt.NDArray[Any],
) -> None:
    """Read one block into `rows`."""
    place = manifest.block(block)
    try:
        with translate_errors(f"{path / spec.name}, view {view}"):
            array.get_basic_selection((view, place, slice(None)), out=NDBuffer.from_numpy_array(rows))
    except UnsafeFileError:  # to compute the block again would not help
        raise
    except FormatError as error:
        what = "damaged or unreadable"
        raise damaged_block_error(what, path, spec, manifest, view, place.start, error.found) from error
    # A written row never starts with the fill value, so the file of this chunk is missing.
    for chunk in np.flatnonzero(spec.stored.is_fill(rows[:: spec.chunk_rows, 0])).tolist():
        row = place.start + chunk * spec.chunk_rows
        raise damaged_block_error("a chunk is missing", path, spec, manifest, view, row)


def _allocate(shape: tuple[int, int], dtype: torch.dtype, pin: bool, where: Path) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=pin)
    except (RuntimeError, MemoryError) as error:
        raise StorageError(
            "a view does not fit into memory",
            where=where,
            expected=f"{shape[0] * shape[1] * dtype.itemsize / 1e9:,.1f} GB",
            next_step="train with --shuffle-window 64 or less, or use a machine with more memory",
        ) from error
