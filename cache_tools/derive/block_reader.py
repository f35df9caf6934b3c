"""Read a cache block by block, each compared with its commit, to measure it or to make another cache from it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.console import Progress
from cache_tools.errors import FormatError
from cache_tools.format import commits
from cache_tools.format.arrays import constant_shapes
from cache_tools.format.commits import BlockId
from cache_tools.reader import TeacherCache

Stored = dict[str, npt.NDArray[Any]]
Rows = dict[str, npt.NDArray[np.float32]]


class BlockReader:
    """Reads the blocks that a cache had when the reader was made. Rows have passed the checks of `cache-tools verify`.

    Threads may read at the same time.
    """

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache
        self._committed = cache.committed_blocks()
        self._last_block: tuple[BlockId, Stored] | None = None
        self._lock = threading.Lock()

    @cached_property
    def constants(self) -> Rows:
        """All arrays that hold for all samples and views."""
        return {name: self.cache.constant(name) for name in constant_shapes(self.cache.recipe)}

    def holds(self, view: int, rows: slice) -> bool:
        """Whether all of these rows are committed."""
        return view < self.cache.num_views and all(self._committed[view, block] for block in self._blocks(rows))

    def read(self, view: int, rows: slice) -> Stored:
        """The stored arrays of these rows, by name. The rows may be part of a block, or of several.

        Raises:
            IncompleteError: not committed.
            FormatError: not what was committed.
        """
        manifest, blocks = self.cache.manifest, self._blocks(rows)
        if len(blocks) == 1 and manifest.block(blocks[0]) == rows:
            return self._read_block(BlockId(view, blocks[0]))
        pieces: dict[str, list[npt.NDArray[Any]]] = {}
        for block in blocks:
            start = manifest.block(block).start
            inside = slice(max(rows.start - start, 0), rows.stop - start)
            for name, values in self._read_again(BlockId(view, block)).items():
                pieces.setdefault(name, []).append(values[inside])
        return {name: np.concatenate(parts) for name, parts in pieces.items()}

    def decode(self, stored: Mapping[str, npt.NDArray[Any]], names: Iterable[str] | None = None) -> Rows:
        """Decode rows [B, width] float32 of these targets, or of all, from their stored arrays."""
        found = {}
        for name in self.cache.targets if names is None else names:
            spec = self.cache.targets[name]
            parts = {array.suffix: stored[array.name] for array in spec.arrays}
            constants = {key.removeprefix(name): self.constants[key] for key in spec.constants}
            found[name] = spec.codec.decode(parts, constants).numpy()
        return found

    def sample(self, view: int, index: npt.NDArray[np.int64]) -> Stored:
        """The stored rows at `index` (ascending) of one view, with one block in memory at a time; raises as `read`."""
        manifest = self.cache.manifest
        blocks = np.unique(index // manifest.block_rows).tolist()
        pieces: dict[str, list[npt.NDArray[Any]]] = {}
        with Progress(f"read view {view}", len(blocks), "blocks") as progress:
            for block in blocks:
                rows = manifest.block(block)
                inside = index[(index >= rows.start) & (index < rows.stop)] - rows.start
                for name, values in self._read_block(BlockId(view, block)).items():
                    pieces.setdefault(name, []).append(values[inside])
                progress.advance(1)
        return {name: np.concatenate(parts) for name, parts in pieces.items()}

    def parameter_digest(self, view: int, rows: slice) -> int:
        """The digest of the view parameters of these rows, as a commit has it."""
        recipe = self.cache.recipe
        return recipe.views.parameter_digest(np.arange(rows.start, rows.stop), view, recipe.dataset.image_size) or 1

    def _blocks(self, rows: slice) -> range:
        size = self.cache.manifest.block_rows
        return range(rows.start // size, -(-rows.stop // size))

    def _read_block(self, block: BlockId) -> Stored:
        rows = self.cache.manifest.block(block.block)
        commit = self.cache.commit(*block)
        if commit.pop(commits.PARAMETERS) != self.parameter_digest(block.view, rows):
            raise self._damaged(commits.COMMITS, block)
        stored = {}
        for name, digest in commit.items():
            stored[name] = self.cache.read_stored(name, block.view, rows)
            if commits.block_digest(stored[name]) != digest:
                raise self._damaged(name, block)
        return stored

    def _read_again(self, block: BlockId) -> Stored:
        """As `_read_block`, but keeps the last block in memory, since several smaller blocks may be cut from it."""
        with self._lock:
            if self._last_block is None or self._last_block[0] != block:
                self._last_block = None  # free its memory first
                self._last_block = block, self._read_block(block)
            return self._last_block[1]

    def _damaged(self, name: str, block: BlockId) -> FormatError:
        return FormatError(
            "stored rows are not those that were committed",
            where=f"{self.cache.path / name}, view {block.view}, block {block.block}",
            next_step=f"drop them (`cache-tools repair {self.cache.path} --yes`), make them again with the command "
            "that made this cache, then run this one again",
        )
