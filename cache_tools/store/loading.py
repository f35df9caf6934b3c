"""Read one view of one array into host memory; an error names the damaged block."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
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
    digests: Sequence[int] | None,
    *,
    pin: bool = False,
) -> torch.Tensor:
    """Read all rows of a committed view, [N, width] as stored, decompressed straight into the tensor's memory.

    Args:
        path: folder of the cache.
        digests: the digest of each block in the commits, to compare with; None skips the comparison. Missing and
            damaged files are found either way, the latter by the crc32c of each chunk.
        pin: use page-locked memory, for asynchronous copies to CUDA.

    Raises:
        FormatError: rows are damaged, missing or not those committed; names the block and how to compute it again.
        StorageError: the disk cannot be read, or the view does not fit into memory.
    """
    check_chunks(spec, manifest, path, view, 0, manifest.num_samples)
    tensor = _allocate((manifest.num_samples, spec.width), getattr(torch, spec.dtype), pin, path / spec.name)
    values = tensor.numpy()
    try:
        with translate_errors(f"{path / spec.name}, view {view}"):
            array.get_basic_selection((view, slice(None), slice(None)), out=NDBuffer.from_numpy_array(values))
    except FormatError as error:
        raise _find_damage(array, spec, manifest, path, view, error) from error
    # A written row never starts with the fill value, so the file of this chunk is missing.
    for chunk in np.flatnonzero(spec.stored.is_fill(values[:: spec.chunk_rows, 0])).tolist():
        raise damaged_block_error("a chunk is missing", path, spec, manifest, view, chunk * spec.chunk_rows)
    if digests is not None:
        rows = [values[manifest.block(block)] for block in range(manifest.num_blocks)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
            for block, digest in enumerate(pool.map(commits.block_digest, rows)):
                if digest != digests[block]:
                    what, row = "stored rows are not those that were committed", block * manifest.block_rows
                    raise damaged_block_error(what, path, spec, manifest, view, row)
    return tensor


def _allocate(shape: tuple[int, int], dtype: torch.dtype, pin: bool, where: Path) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=pin)
    except (RuntimeError, MemoryError) as error:
        raise StorageError(
            "a view does not fit into memory",
            where=where,
            expected=f"{shape[0] * shape[1] * dtype.itemsize / 1e9:,.1f} GB",
            next_step="use a machine with more memory, or a cache of fewer samples",
        ) from error


def _find_damage(
    array: zarr.Array[Any], spec: ArraySpec, manifest: Manifest, path: Path, view: int, error: FormatError
) -> FormatError:
    for block in range(manifest.num_blocks):
        try:
            array[view, manifest.block(block)]
        except UnsafeFileError as unsafe:  # to compute the block again would not help
            return unsafe
        except Exception:  # codecs raise anything
            row = block * manifest.block_rows
            return damaged_block_error("damaged or unreadable", path, spec, manifest, view, row, error.found)
    return error
