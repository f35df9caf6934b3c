"""Where the blocks of a build go: into a folder, or into a mirror whose blocks follow to an object store one by one.

An object store is written to by way of a folder of this machine, a cache like any other: what is computed is safe
there first, and a build that is cut goes on with what it had not uploaded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.console import Progress
from cache_tools.format.commits import BlockId
from cache_tools.format.manifest import Manifest
from cache_tools.home.origin import OriginRecord, write_origin
from cache_tools.places import LocalPlace, Place
from cache_tools.places.claims import Claims
from cache_tools.places.transfer import block_arrays, copy_block, copy_blocks, list_committed
from cache_tools.store.group import translate_errors
from cache_tools.store.writer import CacheWriter


class Output:
    """A cache in a folder, being built.

    Attributes:
        path: the folder.
        place: where other builders and readers find the cache; the claims are beside it.
        manifest: what is to be built.
        writers: how many threads may store blocks at the same time.
        bytes_moved: to and from an object store.
    """

    writers = 1

    def __init__(self, writer: CacheWriter) -> None:
        self._writer, self.path, self.manifest = writer, writer.path, writer.manifest
        self.place: Place = LocalPlace(writer.path)
        self.bytes_moved = 0

    def missing(self) -> list[BlockId]:
        """Blocks that are not committed, in order."""
        done = self.committed()
        return [
            block
            for index in np.ndindex(self.manifest.num_views, self.manifest.num_blocks)
            if (block := BlockId(*index)) not in done
        ]

    def committed(self) -> set[BlockId]:
        """All committed blocks, from one listing."""
        return list_committed(self.place)

    def is_committed(self, block: BlockId) -> bool:
        return self.place.has(block.commit_key)

    def store(self, block: BlockId, arrays: Mapping[str, npt.NDArray[Any]], parameter_digest: int) -> None:
        """Write a block and commit it; see `CacheWriter.write_block`."""
        self._writer.write_block(*block, arrays, parameter_digest)

    def at_hand(self, block: BlockId) -> bool:
        """Whether a block need not be computed, because it was just now brought to its place from the mirror."""
        return False

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around the build."""
        yield

    @property
    def note(self) -> str:
        """For the progress line."""
        return ""


class MirroredOutput(Output):
    """A cache in an object store, being built through a folder."""

    writers = 4
    _here: Claims

    def __init__(self, writer: CacheWriter, place: Place, manifest: Manifest, moved: int) -> None:
        super().__init__(writer)
        self._mirror, self.place, self.manifest, self.bytes_moved = LocalPlace(self.path), place, manifest, moved
        self._arrays = block_arrays(self._mirror, manifest)
        self._lock = threading.Lock()
        self._remember(complete=False)

    def store(self, block: BlockId, arrays: Mapping[str, npt.NDArray[Any]], parameter_digest: int) -> None:
        with self._here.holding(block):  # this machine may build the same cache for itself, or stage it
            if not self._mirror.has(block.commit_key):
                super().store(block, arrays, parameter_digest)
        self._push(block)

    def at_hand(self, block: BlockId) -> bool:
        if not self._mirror.has(block.commit_key):
            return False
        self._push(block)
        return True

    @contextmanager
    def working(self) -> Iterator[None]:
        """Keep the mirror from being tidied away, and first push what an earlier run left there."""
        with Claims(self._mirror) as self._here:
            self._here.prevent_pruning()
            with Claims(self.place) as claims:
                self._push_the_rest(claims)
            yield
        self._remember(complete=True)

    @property
    def note(self) -> str:
        return f"{self.bytes_moved / 1e6:,.1f} MB moved"

    def _push_the_rest(self, claims: Claims) -> None:
        ready = sorted(list_committed(self._mirror) & set(self.missing()))

        def claimed() -> Iterator[BlockId]:
            for block in ready:
                if not claims.claim(block):
                    continue
                if self.is_committed(block):
                    claims.release(block)
                else:
                    yield block

        if ready:
            with Progress("push", len(ready), "blocks") as progress:
                for block, sizes in copy_blocks(self._mirror, self.place, self.manifest, claimed()):
                    claims.release(block)
                    self._count(sizes)
                    progress.advance(1, self.note)

    def _remember(self, *, complete: bool) -> None:
        """Who opens the mirror gets what it lacks from the store."""
        manifest = self.manifest
        record = OriginRecord(
            url=str(self.place), fingerprint=manifest.fingerprint, views=manifest.num_views, complete=complete
        )
        with translate_errors(self.path):
            write_origin(self.path, record)

    def _push(self, block: BlockId) -> None:
        self._count(copy_block(self._mirror, self.place, self.manifest, self._arrays, block))

    def _count(self, sizes: list[int]) -> None:
        with self._lock:
            self.bytes_moved += sum(sizes)
