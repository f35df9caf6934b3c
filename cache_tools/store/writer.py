"""Write a cache block by block: data, flush, then commit. A crash at any instant loses at most the blocks in flight."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.errors import FormatError, MismatchError, StorageError
from cache_tools.files import (
    PARTIAL,
    remove_leftover,
    remove_leftovers,
    rename_unless_exists,
    sync_folder,
    sync_tree,
)
from cache_tools.format import commits
from cache_tools.format.arrays import target_arrays
from cache_tools.format.digests import array_digests, constants_digest
from cache_tools.format.layout import array_layouts
from cache_tools.format.manifest import Canary, Manifest
from cache_tools.format.stored import check_limits, check_storable, group_attributes
from cache_tools.images.recipe import TestSplits
from cache_tools.store.blocks import read_commits
from cache_tools.store.create import check_constants, check_samples, create_empty
from cache_tools.store.encoding import Encoder
from cache_tools.store.group import open_array, open_group, read_manifest, translate_errors
from cache_tools.store.whole import StoredConstants, check_whole_arrays


class CacheWriter:
    """Adds blocks to a cache. `create` and `resume` make one.

    Attributes:
        path: folder of the cache.
        manifest: as stored.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._specs = target_arrays(manifest.recipe, manifest.block_rows)
        for spec in self._specs:
            spec.stored.check_readable()
        self._layouts = array_layouts(manifest)
        self._group = open_group(path, self._layouts, writable=True)
        self._arrays = {spec.name: open_array(self._group, path, spec.name, self._layouts) for spec in self._specs}
        self._commits = open_array(self._group, path, commits.COMMITS, self._layouts)

    @cached_property
    def _encoder(self) -> Encoder:
        constants = StoredConstants(self._group, self.path, self.manifest, self._layouts)
        return Encoder(self.manifest.recipe, constants.__getitem__)

    @classmethod
    def create(
        cls,
        path: Path,
        manifest: Manifest,
        *,
        labels: npt.NDArray[np.int64],
        sample_keys: npt.NDArray[np.uint8],
        constants: Mapping[str, npt.NDArray[np.float32]],
    ) -> CacheWriter:
        """Make an empty cache.

        It is made beside `path` and then renamed, so that a killed `create` leaves nothing at `path`. If another
        process makes the same cache first, that one is opened.

        Args:
            labels: int64 [N].
            sample_keys: uint8 [N, 16].
            constants: the float32 arrays of `arrays.constant_shapes`.

        Raises:
            FormatError: labels, keys or constants do not fit the manifest.
            StorageError: `path` is not free, or the disk is full or read-only.
        """
        path = Path(path)
        check_limits(manifest, where=path)
        check_samples(manifest, labels, sample_keys)
        check_constants(manifest, constants)
        check_free(path)
        digests = array_digests(labels, sample_keys, constants)
        manifest = manifest.model_copy(
            update={"constants_digest": constants_digest(constants), "array_digests": digests}
        )
        check_storable(manifest, where=path)
        with translate_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
            try:
                create_empty(temporary, manifest, labels, sample_keys, constants)
                sync_tree(temporary)
                rename_unless_exists(temporary, path)
                sync_folder(path.parent)
            finally:
                with suppress(OSError):
                    remove_leftover(temporary)
        return cls.resume(path, manifest.fingerprint)

    @classmethod
    def resume(cls, path: Path, fingerprint: str) -> CacheWriter:
        """Open a cache to add blocks to it. Its labels, keys and constants are compared with their digests first.

        Raises:
            NotFoundError, FormatError: no cache there, or a damaged one.
            MismatchError: the cache has another recipe.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest.fingerprint != fingerprint:
            raise MismatchError(
                "the cache of another recipe is here",
                where=path,
                expected=f"fingerprint {fingerprint[:12]}",
                found=manifest.fingerprint[:12],
                next_step="choose another --out, leave out --out, or remove that cache",
            )
        with translate_errors(path):
            remove_leftovers(path)
        writer = cls(path, manifest)
        writer.check_arrays()
        return writer

    def check_arrays(self) -> dict[str, str]:
        """Compare labels, sample keys and constants with their digests; returns the digest of each.

        Raises:
            FormatError: one of them is missing or damaged; names it.
        """
        return check_whole_arrays(self._group, self.path, self.manifest, self._layouts)

    def missing_blocks(self) -> list[commits.BlockId]:
        """Every block that is not committed, in order of view, then block. Reads `commits` once."""
        stored = read_commits(self._commits, self.path, self.manifest)
        return commits.missing_blocks(commits.committed_blocks(stored))

    def write_block(
        self, view: int, block: int, arrays: Mapping[str, npt.NDArray[np.floating[Any]]], parameter_digest: int
    ) -> None:
        """Encode and write one block of all targets, flush it, and commit it.

        Threads may write different blocks at the same time.

        Args:
            arrays: floating-point [rows of the block, width] for each target.
            parameter_digest: digest of the block's view parameters (`ViewRecipe.parameter_digest`).

        Raises:
            FormatError: the cache does not have these targets, this view or this block; or wrong shapes, integers, or
                numbers that are not finite or out of the codec's range. Nothing is written.
            StorageError: the disk is full or read-only. The block stays uncommitted.
        """
        rows = self._rows(view, block)
        where = f"view {view}, samples {rows.start}–{rows.stop - 1}"
        self.write_stored(view, block, self._encoder.encode(arrays, where=where), parameter_digest)

    def write_stored(
        self, view: int, block: int, arrays: Mapping[str, npt.NDArray[Any]], parameter_digest: int
    ) -> None:
        """As `write_block`, for rows that are already encoded.

        Args:
            arrays: [rows of the block, width] for each stored array, in its dtype.
        """
        rows = self._rows(view, block)
        if set(arrays) != set(self._arrays):
            raise FormatError("wrong arrays", where=self.path, expected=sorted(self._arrays), found=sorted(arrays))
        for spec in self._specs:
            values, shape = arrays[spec.name], (rows.stop - rows.start, spec.width)
            if values.shape != shape or values.dtype.name != spec.dtype:
                raise FormatError(
                    "wrong block",
                    where=f"{spec.name}, view {view}, samples {rows.start}–{rows.stop - 1}",
                    expected=f"{spec.dtype} {list(shape)}",
                    found=f"{values.dtype} {list(values.shape)}",
                )
        commit = [parameter_digest or 1, *(commits.block_digest(arrays[spec.name]) for spec in self._specs)]
        with translate_errors(self.path):
            # `DurableStore` flushes each chunk before it returns: rows are on the disk before their commit.
            for name, values in arrays.items():
                self._arrays[name][view, rows] = values
            self._commits[view, block] = np.array(commit, dtype=np.uint64)

    def grow(
        self, num_views: int, *, canaries: Sequence[Canary] = (), note: Mapping[str, Any] | None = None
    ) -> CacheWriter:
        """Add room for more views; returns a writer for the grown cache, or this one if it has enough views.

        Views that another process added meanwhile are kept. Arrays are resized before the manifest is changed, so that
        a reader never finds views in the manifest that the arrays lack.

        Args:
            canaries: canaries of the new views, added to the existing ones.
            note: plain JSON, appended to the list `grown` of the provenance.
        """
        if num_views <= self.manifest.num_views:
            return self
        latest = CacheWriter.resume(self.path, self.manifest.fingerprint)  # another process may have grown it
        stored = latest.manifest
        if num_views <= stored.num_views:
            return latest
        added = (canary for canary in canaries if canary.view >= stored.num_views)
        update: dict[str, Any] = {"num_views": num_views, "canaries": (*stored.canaries, *added)}
        if note is not None:
            notes = stored.provenance.get("grown")
            grown = [*(notes if isinstance(notes, list) else []), dict(note)]
            update["provenance"] = {**stored.provenance, "grown": grown}
        if not stored.array_digests:  # created by an earlier version
            update["array_digests"] = latest.check_arrays()
        manifest = stored.model_copy(update=update)
        check_limits(manifest, where=self.path)
        with translate_errors(self.path):
            for array in (*latest._arrays.values(), latest._commits):
                if array.shape[0] < num_views:
                    array.resize((num_views, *array.shape[1:]))
            latest._group.update_attributes(group_attributes(manifest))
        return CacheWriter.resume(self.path, manifest.fingerprint)

    def record_digests(self) -> CacheWriter:
        """Store the digests of labels, keys and constants if an earlier version created the cache without them.

        Call it only while no other process changes the manifest (`places.claims.growing`).
        """
        latest = CacheWriter.resume(self.path, self.manifest.fingerprint)
        if latest.manifest.array_digests:
            return latest
        manifest = latest.manifest.model_copy(update={"array_digests": latest.check_arrays()})
        with translate_errors(self.path):
            latest._group.update_attributes(group_attributes(manifest))
        return CacheWriter.resume(self.path, manifest.fingerprint)

    def record_test_split(
        self, test_split: TestSplits | None, preflight: Mapping[str, Any] | None, folders: Mapping[str, Any] | None
    ) -> CacheWriter:
        """Change which images the students of this cache are tested on; see `Manifest.with_test_split`."""
        stored = read_manifest(self.path)  # another process may have grown it
        manifest = stored.with_test_split(test_split, preflight, folders)
        check_limits(manifest, where=self.path)
        with translate_errors(self.path):
            self._group.update_attributes(group_attributes(manifest))
        return CacheWriter.resume(self.path, manifest.fingerprint)

    def _rows(self, view: int, block: int) -> slice:
        manifest = self.manifest
        if not (0 <= view < manifest.num_views and 0 <= block < manifest.num_blocks):
            raise FormatError(
                "no such block",
                where=self.path,
                expected=f"view 0–{manifest.num_views - 1}, block 0–{manifest.num_blocks - 1}",
                found=f"view {view}, block {block}",
            )
        return manifest.block(block)


def check_free(path: Path) -> None:
    """Raise StorageError unless `path` is free for a new cache: it does not exist or is an empty folder."""
    with translate_errors(path):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise StorageError("cannot make a cache here: the place is taken", where=path, next_step="choose another")
