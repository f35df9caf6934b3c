"""Read a cache block by block, every block compared with its commit: what is measured or made into another cache."""

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
from cache_tools.reader import TeacherCache

Stored = dict[str, npt.NDArray[Any]]
Rows = dict[str, npt.NDArray[np.float32]]


class BlockReader:
    """The blocks that a cache held when this was made. What it gives has passed the checks of `cache-tools verify`.

    Threads may read at the same time.
    """

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache
        self._committed = cache.committed_blocks()
        self._kept: tuple[tuple[int, int], Stored] | None = None
        self._lock = threading.Lock()

    @cached_property
    def constants(self) -> Rows:
        """All arrays that hold for all samples and views."""
        return {name: self.cache.constant(name) for name in constant_shapes(self.cache.recipe)}

    def holds(self, view: int, rows: slice) -> bool:
        """Whether all of these rows are committed."""
        return view < self.cache.num_views and all(self._committed[view, block] for block in self._blocks(rows))

    def read(self, view: int, rows: slice) -> Stored:
        """The stored arrays of these rows, by name. Blocks of another size than the cache's own are cut out of those.

        Raises:
            IncompleteError: not committed.
            FormatError: not what was committed.
        """
        manifest, blocks = self.cache.manifest, self._blocks(rows)
        if len(blocks) == 1 and manifest.block(blocks[0]) == rows:
            return self._read_block(view, blocks[0])
        pieces: dict[str, list[npt.NDArray[Any]]] = {}
        for block in blocks:
            start = manifest.block(block).start
            inside = slice(max(rows.start - start, 0), rows.stop - start)
            for name, values in self._read_kept(view, block).items():
                pieces.setdefault(name, []).append(values[inside])
        return {name: np.concatenate(parts) for name, parts in pieces.items()}

    def decode(self, stored: Mapping[str, npt.NDArray[Any]], names: Iterable[str] | None = None) -> Rows:
        """Rows [B, width] float32 of these targets, or of all, from what is stored of them."""
        found = {}
        for name in self.cache.targets if names is None else names:
            spec = self.cache.targets[name]
            parts = {array.suffix: stored[array.name] for array in spec.arrays}
            constants = {key.removeprefix(name): self.constants[key] for key in spec.constants}
            found[name] = spec.codec.decode(parts, constants).numpy()
        return found

    def sample(self, view: int, index: npt.NDArray[np.int64]) -> Stored:
        """The stored rows at `index` (ascending) of one view, one block in memory at a time; errors as for `read`."""
        manifest = self.cache.manifest
        blocks = np.unique(index // manifest.block_rows).tolist()
        pieces: dict[str, list[npt.NDArray[Any]]] = {}
        with Progress(f"read view {view}", len(blocks), "blocks") as progress:
            for block in blocks:
                rows = manifest.block(block)
                inside = index[(index >= rows.start) & (index < rows.stop)] - rows.start
                for name, values in self._read_block(view, block).items():
                    pieces.setdefault(name, []).append(values[inside])
                progress.advance(1)
        return {name: np.concatenate(parts) for name, parts in pieces.items()}

    def parameter_digest(self, view: int, rows: slice) -> int:
        """What a commit of these rows says of their view parameters."""
        recipe = self.cache.recipe
        return recipe.views.parameter_digest(np.arange(rows.start, rows.stop), view, recipe.dataset.image_size) or 1

    def _blocks(self, rows: slice) -> range:
        size = self.cache.manifest.block_rows
        return range(rows.start // size, -(-rows.stop // size))

    def _read_block(self, view: int, block: int) -> Stored:
        rows = self.cache.manifest.block(block)
        commit = self.cache.commit(view, block)
        if commit.pop(commits.PARAMETERS) != self.parameter_digest(view, rows):
            raise self._damaged(commits.COMMITS, view, block)
        stored = {}
        for name, digest in commit.items():
            stored[name] = self.cache.read_stored(name, view, rows)
            if commits.block_digest(stored[name]) != digest:
                raise self._damaged(name, view, block)
        return stored

    def _read_kept(self, view: int, block: int) -> Stored:
        """The block that was read last is kept: smaller ones are cut from it one after the other."""
        with self._lock:
            if self._kept is None or self._kept[0] != (view, block):
                self._kept = None
                self._kept = (view, block), self._read_block(view, block)
            return self._kept[1]

    def _damaged(self, name: str, view: int, block: int) -> FormatError:
        return FormatError(
            "stored rows are not those that were committed",
            where=f"{self.cache.path / name}, view {view}, block {block}",
            next_step=f"drop them (`cache-tools repair {self.cache.path} --yes`), make them again with the command "
            "that made this cache, then run this one again",
        )
