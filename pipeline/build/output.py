"""Store the blocks of a build: in a folder, or in a mirror from which each block is uploaded to an object store.

The mirror is a folder of this machine and a cache like any other. Each block is stored there first, so an interrupted
build continues by uploading the blocks that the store lacks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.console import Progress
from cache_tools.files import MAX_METADATA_BYTES
from cache_tools.format.commits import BlockId
from cache_tools.format.manifest import Manifest
from cache_tools.home.origin import OriginRecord, write_origin
from cache_tools.images.recipe import TestSplits
from cache_tools.places import LocalPlace, Place
from cache_tools.places.arrays import GROUP
from cache_tools.places.claims import Claims, growing
from cache_tools.places.transfer import block_arrays, copy_block, copy_blocks, list_committed
from cache_tools.store.group import translate_errors
from cache_tools.store.writer import CacheWriter


class Output:
    """A cache in a folder that is being built.

    Attributes:
        path: the folder.
        place: where other builders and readers find the cache; the claims lie beside it.
        manifest: of the finished cache.
        store_threads: the number of threads that may store blocks at the same time.
        bytes_moved: to and from an object store.
    """

    store_threads = 1

    def __init__(self, writer: CacheWriter) -> None:
        self._writer, self.path, self.manifest = writer, writer.path, writer.manifest
        self.place: Place = LocalPlace(writer.path)
        self.bytes_moved = 0

    def record_test_split(
        self, test_split: TestSplits | None, preflight: Mapping[str, Any] | None, folders: Mapping[str, Any] | None
    ) -> None:
        """Store other test splits in the manifest, and a preflight on the first of them if there was one."""
        with growing(self.place):
            self._writer = self._writer.record_test_split(test_split, preflight, folders)
        self.manifest = self._writer.manifest

    def missing_blocks(self) -> list[BlockId]:
        """Blocks that are not committed, in order."""
        done = self.committed_blocks()
        return [
            block
            for index in np.ndindex(self.manifest.num_views, self.manifest.num_blocks)
            if (block := BlockId(*index)) not in done
        ]

    def committed_blocks(self) -> set[BlockId]:
        """All committed blocks, from one listing."""
        return list_committed(self.place)

    def is_committed(self, block: BlockId) -> bool:
        return self.place.has(block.commit_key)

    def store(self, block: BlockId, arrays: Mapping[str, npt.NDArray[Any]], parameter_digest: int) -> None:
        """Write a block and commit it; see `CacheWriter.write_block`."""
        self._writer.write_block(*block, arrays, parameter_digest)

    def push_from_mirror(self, block: BlockId) -> bool:
        """Upload a block that the mirror already has, so that it need not be computed. Returns whether it did."""
        return False

    @contextmanager
    def building(self) -> Iterator[None]:
        """The context in which the blocks are built."""
        yield

    @property
    def progress_note(self) -> str:
        """The end of the progress line."""
        return ""


class MirroredOutput(Output):
    """A cache in an object store that is being built through a folder, its mirror."""

    store_threads = 4
    _mirror_claims: Claims

    def __init__(self, writer: CacheWriter, place: Place, manifest: Manifest, moved: int) -> None:
        super().__init__(writer)
        self._mirror, self.place, self.manifest, self.bytes_moved = LocalPlace(self.path), place, manifest, moved
        self._arrays = block_arrays(self._mirror, manifest)
        self._lock = threading.Lock()
        self._record_origin(complete=False)

    def store(self, block: BlockId, arrays: Mapping[str, npt.NDArray[Any]], parameter_digest: int) -> None:
        with self._mirror_claims.holding(block):  # other processes may build or stage the same cache in this folder
            if not self._mirror.has(block.commit_key):
                super().store(block, arrays, parameter_digest)
        self._push(block)

    def record_test_split(
        self, test_split: TestSplits | None, preflight: Mapping[str, Any] | None, folders: Mapping[str, Any] | None
    ) -> None:
        with growing(self.place), growing(self._mirror):
            self._writer = self._writer.record_test_split(test_split, preflight, folders)
            self.place.put(GROUP, self._mirror.read(GROUP, MAX_METADATA_BYTES))
        self.manifest = self._writer.manifest

    def push_from_mirror(self, block: BlockId) -> bool:
        if not self._mirror.has(block.commit_key):
            return False
        self._push(block)
        return True

    @contextmanager
    def building(self) -> Iterator[None]:
        """Protect the mirror from pruning, and first upload the blocks that an earlier run left there."""
        with Claims(self._mirror) as self._mirror_claims:
            self._mirror_claims.prevent_pruning()
            with Claims(self.place) as claims:
                self._push_leftovers(claims)
            yield
        self._record_origin(complete=True)

    @property
    def progress_note(self) -> str:
        return f"{self.bytes_moved / 1e6:,.1f} MB moved"

    def _push_leftovers(self, claims: Claims) -> None:
        ready = sorted(list_committed(self._mirror) & set(self.missing_blocks()))

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
                    self._add_moved(sizes)
                    progress.advance(1, self.progress_note)

    def _record_origin(self, *, complete: bool) -> None:
        """Record the URL of this mirror: its readers get missing blocks from there."""
        manifest = self.manifest
        record = OriginRecord(
            url=str(self.place), fingerprint=manifest.fingerprint, views=manifest.num_views, complete=complete
        )
        with translate_errors(self.path):
            write_origin(self.path, record)

    def _push(self, block: BlockId) -> None:
        self._add_moved(copy_block(self._mirror, self.place, self.manifest, self._arrays, block))

    def _add_moved(self, sizes: list[int]) -> None:
        with self._lock:
            self.bytes_moved += sum(sizes)
