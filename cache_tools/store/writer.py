"""Write a cache block by block: data, flush, then commit. A crash at any instant loses at most the blocks in flight."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.errors import FormatError, MismatchError, StorageError
from cache_tools.files import PARTIAL, remove_leftovers, rename_unless_exists, sync_folder, sync_tree
from cache_tools.format import commits
from cache_tools.format.arrays import target_arrays
from cache_tools.format.layout import array_layouts
from cache_tools.format.manifest import Canary, Manifest
from cache_tools.format.stored import MANIFEST_KEY, check_limits, manifest_attribute
from cache_tools.store.blocks import read_commits
from cache_tools.store.create import StoredConstants, check_constants, check_samples, constants_digest, lay_out
from cache_tools.store.encoding import Encoder
from cache_tools.store.group import open_array, open_group, read_manifest, translated


class CacheWriter:
    """The one who adds blocks to a cache. Get one from `create` or `resume`.

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

        It is made beside `path` and renamed into place, so that a killed `create` leaves nothing at `path`. If another
        process made the same cache meanwhile, that one is opened.

        Args:
            labels: int64 [N].
            sample_keys: uint8 [N, 16].
            constants: float32 arrays, those of `arrays.constant_shapes`.

        Raises:
            FormatError: labels, keys or constants that are not what the manifest says.
            StorageError: something is at `path` already, or the disk is full or read-only.
        """
        path = Path(path)
        check_limits(manifest, where=path)
        check_samples(manifest, labels, sample_keys)
        check_constants(manifest, constants)
        check_free(path)
        manifest = manifest.model_copy(update={"constants_digest": constants_digest(constants)})
        with translated(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
            try:
                lay_out(temporary, manifest, labels, sample_keys, constants)
                sync_tree(temporary)
                rename_unless_exists(temporary, path)
                sync_folder(path.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return cls.resume(path, manifest.fingerprint)

    @classmethod
    def resume(cls, path: Path, fingerprint: str) -> CacheWriter:
        """Open a cache to go on with it.

        Raises:
            NotFoundError, FormatError: no cache there, or a damaged one.
            MismatchError: the cache of another recipe.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest.fingerprint != fingerprint:
            raise MismatchError(
                "the cache of another recipe is here",
                where=path,
                expected=f"fingerprint {fingerprint[:12]}",
                found=manifest.fingerprint[:12],
                next_step="choose another --out, leave --out away, or remove that cache",
            )
        with translated(path):
            remove_leftovers(path)
        return cls(path, manifest)

    def missing_blocks(self) -> list[commits.BlockId]:
        """(view, block) of every block that is not committed, in order; one read of `commits`."""
        stored = read_commits(self._commits, self.path, self.manifest)
        return commits.missing_blocks(commits.committed_blocks(stored))

    def write_block(
        self, view: int, block: int, arrays: Mapping[str, npt.NDArray[np.floating[Any]]], parameter_digest: int
    ) -> None:
        """Write one block of every target array, flush it, and commit it. Threads may write distinct blocks at once.

        Args:
            arrays: floating [rows of the block, width] for each target; stored as the recipe's codecs say.
            parameter_digest: of the block's view parameters (`ViewRecipe.parameter_digest`).

        Raises:
            FormatError: targets, a view or a block that the cache does not have, wrong shapes, integers, numbers that
                are not finite or beyond what the codec holds. Nothing is written then.
            StorageError: the disk is full or read-only. The block stays uncommitted.
        """
        rows = self._rows(view, block)
        where = f"view {view}, samples {rows.start}–{rows.stop - 1}"
        self.write_stored(view, block, self._encoder.encode(arrays, where=where), parameter_digest)

    def write_stored(
        self, view: int, block: int, arrays: Mapping[str, npt.NDArray[Any]], parameter_digest: int
    ) -> None:
        """As `write_block`, for rows that are encoded already.

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
        with translated(self.path):
            # The store flushes each chunk before it returns (durable.py): the commit cannot overtake its rows.
            for name, values in arrays.items():
                self._arrays[name][view, rows] = values
            self._commits[view, block] = np.array(commit, dtype=np.uint64)

    def grow(
        self, num_views: int, *, canaries: Sequence[Canary] = (), note: Mapping[str, Any] | None = None
    ) -> CacheWriter:
        """The same cache with room for more views; with as many or fewer, itself.

        Views that another process has added since this writer was opened stay. Arrays are resized before the manifest
        promises the views, so a reader never sees a promise without arrays.

        Args:
            canaries: those of the new views are added to those that are there.
            note: what the list `grown` of the provenance is to say of this, plain JSON.
        """
        if num_views <= self.manifest.num_views:
            return self
        now = CacheWriter.resume(self.path, self.manifest.fingerprint)  # another process may have grown it since
        there = now.manifest
        if num_views <= there.num_views:
            return now
        added = (canary for canary in canaries if canary.view >= there.num_views)
        update: dict[str, Any] = {"num_views": num_views, "canaries": (*there.canaries, *added)}
        if note is not None:
            before = there.provenance.get("grown")
            grown = [*(before if isinstance(before, list) else []), dict(note)]
            update["provenance"] = {**there.provenance, "grown": grown}
        manifest = there.model_copy(update=update)
        check_limits(manifest, where=self.path)
        with translated(self.path):
            for array in (*now._arrays.values(), now._commits):
                if array.shape[0] < num_views:
                    array.resize((num_views, *array.shape[1:]))
            now._group.update_attributes({MANIFEST_KEY: manifest_attribute(manifest)})
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
    """Raise StorageError unless `path` is free for a new cache: nothing there, or an empty folder."""
    with translated(path):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise StorageError("cannot make a cache here: the place is taken", where=path, next_step="choose another")
