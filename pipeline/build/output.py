"""Store the blocks of a build: in a folder, or in a mirror from which each block is uploaded to an object store.

The mirror is a folder of this machine and a cache like any other. Each block is stored there first, so an interrupted
build continues by uploading the blocks that the store lacks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.console import Progress
from cache_tools.errors import RecipeError
from cache_tools.files import MAX_METADATA_BYTES
from cache_tools.format.commits import BlockId
from cache_tools.format.manifest import Manifest
from cache_tools.format.rolling import Rolling
from cache_tools.home.origin import OriginRecord, write_origin
from cache_tools.images.recipe import TestSplits
from cache_tools.places import LocalPlace, Place
from cache_tools.places.arrays import GROUP
from cache_tools.places.claims import Claims, growing
from cache_tools.places.metadata import manifest_at
from cache_tools.places.rolling import record_rolling, remove_dropped
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
        self.bytes_moved, self._forgotten = 0, 0

    def record_test_split(
        self, test_split: TestSplits | None, preflight: Mapping[str, Any] | None, folders: Mapping[str, Any] | None
    ) -> None:
        """Store other test splits in the manifest, and a preflight on the first of them if there was one."""
        with self._changing():
            self._writer = self._writer.record_test_split(test_split, preflight, folders)
        self.manifest = self._writer.manifest

    def missing_blocks(self) -> list[BlockId]:
        """Blocks that are not committed, in order, without those of dropped views."""
        done, rolling = self.committed_blocks(), self.rolling()
        first = 0 if rolling is None else rolling.dropped
        return [
            block
            for index in np.ndindex(self.manifest.num_views, self.manifest.num_blocks)
            if (block := BlockId(*index)) not in done and block.view >= first
        ]

    def rolling(self) -> Rolling | None:
        """The state of a rolling cache, read again at each call; None for all others."""
        return None if self.manifest.rolling is None else manifest_at(self.place).rolling

    def keep_views(self, keep: int) -> None:
        """Make this a rolling cache, if it has no block yet, or change how many views a rolling cache keeps.

        Raises:
            RecipeError: a cache that was begun without dropping views.
        """
        with self._changing():
            rolling = manifest_at(self.place).rolling
            if rolling is None and self.committed_blocks():
                raise RecipeError(
                    "this cache was begun to keep all its views",
                    where=f"{self.place}, --keep-views {keep}",
                    next_step="leave out --keep-views, or choose another --out",
                )
            rolling = Rolling(keep=keep) if rolling is None else rolling.model_copy(update={"keep": keep})
            for place in self._places:
                record_rolling(place, rolling)
        self.manifest = self.manifest.model_copy(update={"rolling": rolling})

    def drop_views(self, count: int, allowed: Callable[[], bool]) -> None:
        """Drop the first views of a rolling cache, for good.

        Args:
            allowed: asked once more when readers can see that they are dropped.
        """
        with self._changing():
            before = manifest_at(self.place).rolling
            assert before is not None, "a rolling cache stays one"
            if before.dropped >= count:
                return
            rolling = before.model_copy(update={"dropped": count})
            for place in self._places:
                record_rolling(place, rolling)
            if not allowed():
                for place in self._places:
                    record_rolling(place, before)
                return
        self.forget_dropped(count)

    def forget_dropped(self, count: int) -> None:
        """Remove the files of dropped views, also those that a killed builder has left."""
        if count > self._forgotten:
            for place in self._places:
                remove_dropped(place, self.manifest, count)
            self._forgotten = count

    @property
    def _places(self) -> tuple[Place, ...]:
        """All places that have the views."""
        return (self.place,)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The context in which the manifests at these places are changed."""
        with ExitStack() as stack:
            for place in self._places:
                stack.enter_context(growing(place))
            yield

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
        with self._changing():
            self._writer = self._writer.record_test_split(test_split, preflight, folders)
            self.place.put(GROUP, self._mirror.read(GROUP, MAX_METADATA_BYTES))
        self.manifest = self._writer.manifest

    @property
    def _places(self) -> tuple[Place, ...]:
        return self.place, self._mirror

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
