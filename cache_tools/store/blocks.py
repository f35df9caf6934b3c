"""The commits of a cache in a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cache_tools.errors import CacheError, FormatError, IncompleteError, NotFoundError, UnsafeFileError
from cache_tools.files import SafeFolder
from cache_tools.format import commits
from cache_tools.format.manifest import Manifest
from cache_tools.format.rolling import Rolling, dropped_error
from cache_tools.store.group import read_manifest, translate_errors

if TYPE_CHECKING:
    import zarr


class LocalBlocks:
    """The blocks of a cache in a local folder.

    `StagedBlocks` (cache_tools.home.staging) has the same methods for the mirror of a remote cache.

    Args:
        table: the array `commits`.

    Attributes:
        where: names the cache in messages.
        digests: `commits` as last read, uint64 [V, blocks, columns]; 0 where nothing is committed.
    """

    def __init__(self, path: Path, manifest: Manifest, table: zarr.Array[Any]) -> None:
        self.where, self._path, self._manifest, self._table = str(path), path, manifest, table
        self.digests = np.zeros((manifest.num_views, manifest.num_blocks, table.shape[2]), np.uint64)

    def committed(self) -> npt.NDArray[np.bool_]:
        """Which blocks can be read, bool [V, blocks]. Looks at the disk again while any is missing."""
        if not self.digests.all():
            self.digests = read_commits(self._table, self._path, self._manifest)
        return commits.committed_blocks(self.digests)

    def hold(self, views: Sequence[int]) -> None:
        """Have these views here until `hold` of others or `release`; views of a local cache are here anyway."""

    def release(self, view: int) -> None:
        """This view need not be here any more."""

    def require(self, view: int, blocks: range) -> None:
        """Make sure that these blocks of a view can be read.

        Raises:
            NotFoundError: no such view.
            IncompleteError: some of them are not committed.
            DroppedError: the view was dropped.
        """
        if not 0 <= view < self._manifest.num_views:
            expected = f"0 to {self._manifest.num_views - 1}"
            raise NotFoundError("no such view", where=self._path, expected=expected, found=view)
        missing = self._missing(view, blocks)
        if missing:
            if (rolling := self.rolling()) is not None and view < rolling.dropped:
                raise dropped_error(rolling, self.where, view)
            raise IncompleteError(
                f"view {view} is not completely built",
                where=self.where,
                expected=f"{self._manifest.num_blocks} blocks",
                found=f"{commits.ranges(missing)} missing",
                next_step=self._next_step,
            )

    def require_all(self) -> None:
        """Raise IncompleteError unless every block can be read, DroppedError if some never will."""
        committed = self.committed()
        if not committed.all():
            if (rolling := self.rolling()) is not None and not committed[: rolling.dropped].all():
                raise dropped_error(rolling, self.where)
            complete = int(committed.all(axis=1).sum())
            raise IncompleteError(
                "the cache is not completely built",
                where=self.where,
                expected=f"{self._manifest.num_views} views",
                found=f"{complete} complete, {int((~committed).sum())} of {committed.size} blocks missing",
                next_step=self._next_step,
            )

    def rolling(self) -> Rolling | None:
        """The state of a rolling cache, read again at each call; None for all others."""
        return None if self._manifest.rolling is None else read_manifest(self._path).rolling

    def _missing(self, view: int, blocks: range) -> list[int]:
        """The blocks that cannot be read. Blocks that were found stay found, but for dropped views."""
        rows = slice(blocks.start, blocks.stop)
        committed = commits.committed_blocks(self.digests[view, rows])
        if not committed.all():
            committed = LocalBlocks.committed(self)[view, rows]
        return [blocks[number] for number in np.flatnonzero(~committed)]

    @property
    def _next_step(self) -> str:
        return f"run the same {self._manifest.recipe.made_by} command again: it continues from what is stored"


def read_commits(table: zarr.Array[Any], path: Path, manifest: Manifest) -> npt.NDArray[np.uint64]:
    """Read the commits of all blocks, uint64 [V, blocks, columns]; 0 where nothing is committed.

    Reads only files that exist, because a manifest may claim any number of blocks.

    Raises:
        FormatError: a damaged commit; names the file.
    """
    folder = path / commits.COMMITS
    columns = table.shape[2]
    found = np.zeros((manifest.num_views, manifest.num_blocks, columns), dtype=np.uint64)
    with translate_errors(folder):
        ids = commits.parse_file_names(SafeFolder(path).names(commits.COMMITS), manifest)
    if not ids:
        return found
    views, blocks = np.array(ids).T
    if (read := _read_sound(SafeFolder(path), ids, columns)) is not None:
        found[views, blocks] = read
        return found
    try:
        with translate_errors(folder):
            if len(ids) == manifest.num_views * manifest.num_blocks:
                return np.asarray(table[: manifest.num_views])
            coordinates = (views[:, None], blocks[:, None], np.arange(columns)[None, :])
            found[views, blocks] = np.asarray(table.get_coordinate_selection(coordinates)).reshape(-1, columns)
    except FormatError as error:
        damaged = _find_damaged_commit(table, path, ids, manifest)
        if damaged is None:
            raise
        raise damaged from error
    return found


def _read_sound(folder: SafeFolder, ids: list[commits.BlockId], columns: int) -> npt.NDArray[np.uint64] | None:
    """The commits of these blocks, uint64 [blocks, columns]; None if the file of one is not sound.

    A file is little-endian numbers and their crc32c: `check_array` has compared the codecs. zarr takes a millisecond
    for each, and reads them again where one is not sound, for its error.
    """
    from google_crc32c import value as crc32c

    found = np.empty((len(ids), columns), np.uint64)
    size = found[0].nbytes
    try:
        for number, block in enumerate(ids):
            data = folder.read_bytes(block.commit_key, size + 4)
            if len(data) != size + 4 or crc32c(data[:size]) != int.from_bytes(data[size:], "little"):
                return None
            found[number] = np.frombuffer(data, "<u8", columns)
    except (CacheError, OSError):
        return None
    return found


def _find_damaged_commit(
    table: zarr.Array[Any], path: Path, ids: list[commits.BlockId], manifest: Manifest
) -> FormatError | None:
    for block in ids:
        try:
            table[block.view, block.block]
        except UnsafeFileError as error:
            return error
        except Exception:  # codecs raise anything
            return FormatError(
                "damaged commit",
                where=path / block.commit_key,
                next_step=f"remove this file: the same {manifest.recipe.made_by} command makes the block again",
            )
    return None
