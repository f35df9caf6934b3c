"""Commits: 64-bit digests of the stored rows of each block. Blocks without a commit are never read.

The array `commits` is uint64 [V, blocks, 1 + number of target arrays]. Each block has one chunk, a file that is
written once all its digests are known (`CacheWriter.write_stored`) and replaced atomically: a listing sees the file, a
reader the digests. Column 0 is the digest of the block's view parameters; the others are the digests of its rows, in
the order of `arrays.target_arrays`. The fill value 0 means "not committed", so no digest is 0.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cache_tools.format.arrays import target_arrays
from cache_tools.format.manifest import Manifest
from cache_tools.format.recipe import CacheRecipe
from cache_tools.lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt


COMMITS = "commits"
PARAMETERS = "view_parameters"
_NUMBER = r"(0|[1-9][0-9]{0,9})"
_FILE_NAME = re.compile(rf"c\.{_NUMBER}\.{_NUMBER}\.0")


class BlockId(NamedTuple):
    """One block of one view."""

    view: int
    block: int

    @property
    def commit_key(self) -> str:
        """File of its commit, relative to the cache; the block is committed if and only if this file exists."""
        return f"{COMMITS}/c.{self.view}.{self.block}.0"


def columns(recipe: CacheRecipe, block_rows: int) -> list[str]:
    """Names of the columns of `commits`, stored in its attribute `columns`."""
    return [PARAMETERS, *(spec.name for spec in target_arrays(recipe, block_rows))]


def block_digest(rows: npt.NDArray[np.generic]) -> int:
    """64 bits of blake2b over rows in C order, little-endian as stored; never 0."""
    array = np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("<"))
    return int.from_bytes(hashlib.blake2b(array.data, digest_size=8).digest(), "little") or 1


def content_digest(keys: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer], class_names: Sequence[str]) -> str:
    """32 hex digits over sample keys, labels and class names: `DatasetIdentity.content_digest`."""
    digest = hashlib.blake2b(np.ascontiguousarray(keys).data, digest_size=16)
    digest.update(np.ascontiguousarray(labels, dtype="<i8" if labels.ndim == 1 else "u1").data)
    digest.update(json.dumps(list(class_names), ensure_ascii=True).encode())
    return digest.hexdigest()


def committed_blocks(digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which blocks are committed, bool [V, blocks], from digests [V, blocks, columns]."""
    committed: npt.NDArray[np.bool_] = (digests != 0).all(axis=-1)
    return committed


def missing_blocks(committed: npt.NDArray[np.bool_]) -> list[BlockId]:
    """The blocks that are not committed, in order of view, then block."""
    return [BlockId(int(view), int(block)) for view, block in np.argwhere(~committed)]


def parse_file_name(name: str) -> BlockId | None:
    """The block that a file of `commits` commits; None for any other file."""
    match = _FILE_NAME.fullmatch(name)
    return BlockId(int(match[1]), int(match[2])) if match else None


def parse_file_names(names: Iterable[str], manifest: Manifest) -> list[BlockId]:
    """The blocks that these files commit, ascending; files of blocks that the manifest does not have are ignored."""
    found = (block for name in names if (block := parse_file_name(name)) is not None)
    return sorted(each for each in found if each.view < manifest.num_views and each.block < manifest.num_blocks)


def ranges(numbers: Sequence[int]) -> str:
    """`0, 3–7, 9` for ascending whole numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
