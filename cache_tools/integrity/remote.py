"""Verify and repair a cache in an object store, where it is.

Metadata and constants are brought into a temporary folder, and each block for the moment in which it is checked, all as
the store has them: what `integrity` says of them it says of the remote cache, whatever they hold.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from cache_tools.console import Progress
from cache_tools.errors import FormatError
from cache_tools.files import MAX_METADATA_BYTES
from cache_tools.format import commits
from cache_tools.format.arrays import constant_shapes, target_arrays
from cache_tools.format.commits import BlockId
from cache_tools.format.layout import array_layouts
from cache_tools.format.manifest import Manifest
from cache_tools.home.listing import commit_names
from cache_tools.integrity import local
from cache_tools.integrity.local import METADATA, WORKERS, Repair, Verification
from cache_tools.places import Entry, Place
from cache_tools.places.metadata import manifest_at
from cache_tools.places.transfer import block_files
from cache_tools.store.create import metadata_files


def verify(place: Place) -> Verification:
    """Check every stored byte of a remote cache, complete or half-built.

    Raises:
        NotFoundError, FormatError: no cache, or a manifest so damaged that nothing else can be checked.
        StorageError: a store that does not answer: nothing is said of the cache then.
    """
    manifest = manifest_at(place)
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        root = Path(folder) / "cache"
        found = local.verify(root, _Blocks(place, manifest, root))
        problems = tuple(
            problem.model_copy(update={"where": problem.where.replace(str(root), str(place), 1)})
            for problem in found.problems
        )
    return found.model_copy(update={"path": str(place), "problems": problems})


def repair(place: Place, verification: Verification) -> Repair:
    """Drop the commits of bad blocks and write damaged metadata anew; nothing sound is touched.

    Copying a sound cache there brings the dropped blocks again.
    """
    expected = metadata_files(manifest_at(place))
    dropped, rewritten = set(), []
    for problem in verification.problems:
        if problem.cure == "block" and problem.view is not None and problem.block is not None:
            place.delete([BlockId(problem.view, problem.block).commit_key])
            dropped.add(BlockId(problem.view, problem.block))
        elif problem.cure == "metadata":
            name = problem.where.removeprefix(f"{place}/")
            place.put(name, json.dumps(expected[name], indent=2).encode())
            rewritten.append(name)
    left = tuple(problem for problem in verification.problems if problem.cure == "copy")
    return Repair(dropped=tuple(sorted(dropped)), rewritten=tuple(rewritten), left=left)


class _Blocks:
    """The files of a remote cache, brought into a folder as they are asked for."""

    def __init__(self, place: Place, manifest: Manifest, root: Path) -> None:
        self._place, self._manifest, self._root = place, manifest, root
        self._specs = target_arrays(manifest.recipe, manifest.block_rows)
        layouts = array_layouts(manifest)
        self._limits = {name: layout.max_file_bytes for name, layout in layouts.items()}
        names = (*(spec.name for spec in self._specs), commits.COMMITS)
        for name in names:  # there, even if they are empty
            (root / name).mkdir(parents=True)
        whole = ("labels", "sample_keys", *constant_shapes(manifest.recipe))
        keys = [METADATA, *(f"{name}/{METADATA}" for name in layouts)]
        keys += [f"{name}/{chunk}" for name in whole for chunk in layouts[name].chunk_names]
        with ThreadPoolExecutor(WORKERS) as pool, Progress("metadata", len(keys), "files") as progress:
            for _ in pool.map(self._bring, keys):
                progress.advance(1)

    def committed(self) -> list[BlockId]:
        found = (Entry(key, 0, 0.0) for key in self._place.keys(commits.COMMITS))
        return commits.parse_file_names(commit_names(found), self._manifest)

    @contextmanager
    def at_hand(self, view: int, block: int) -> Iterator[None]:
        keys = [key for spec in self._specs for key in block_files(spec, self._manifest, BlockId(view, block))]
        keys.append(BlockId(view, block).commit_key)
        try:
            for key in keys:
                self._bring(key)
            yield
        finally:
            for key in keys:
                (self._root / key).unlink(missing_ok=True)

    def _bring(self, key: str) -> None:
        """Bring a file as it is; leave out one that is not there; stand in for one that is larger than it can be."""
        limit = MAX_METADATA_BYTES if key.endswith(METADATA) else self._limits[key.partition("/")[0]]
        file = self._root / key
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            file.write_bytes(self._place.read(key, limit))
        except FileNotFoundError:
            return
        except FormatError:
            with file.open("wb") as stream:
                stream.truncate(limit + 1)
