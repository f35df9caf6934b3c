"""Verify and repair a cache in an object store, in place.

Metadata and constants are downloaded unchanged into a temporary folder, and each block for as long as it is checked, so
that `integrity.local` checks the remote cache as if it were local.
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
from cache_tools.format.arrays import target_arrays
from cache_tools.format.commits import BlockId
from cache_tools.format.digests import whole_arrays
from cache_tools.format.layout import array_layouts
from cache_tools.format.manifest import Manifest
from cache_tools.home.listing import commit_names
from cache_tools.integrity import local
from cache_tools.integrity.local import METADATA, WORKERS, Repair, Verification
from cache_tools.places import Place
from cache_tools.places.claims import growing, if_permitted
from cache_tools.places.metadata import manifest_at
from cache_tools.places.transfer import block_files


def verify(place: Place) -> Verification:
    """Check every stored byte of a remote cache, complete or half-built.

    Raises:
        NotFoundError, FormatError: no cache, or a manifest so damaged that nothing else can be checked.
        StorageError: a store that does not answer, so that the cache could not be checked.
    """
    manifest = manifest_at(place)
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        root = Path(folder) / "cache"
        found = local.verify(root, _RemoteBlocks(place, manifest, root))
        problems = tuple(
            problem.model_copy(update={"where": problem.where.replace(str(root), str(place), 1)})
            for problem in found.problems
        )
    dropped = manifest_at(place).num_dropped  # a build may drop views meanwhile
    problems = tuple(each for each in problems if each.view is None or each.view >= dropped)
    return found.model_copy(update={"path": str(place), "problems": problems, "views_dropped": dropped})


def repair(place: Place, verification: Verification) -> Repair:
    """Drop the commits of damaged blocks and rewrite damaged metadata; nothing sound is touched.

    Copying a sound cache to the same place brings the dropped blocks again.
    """
    dropped, rewritten = set(), []
    for problem in verification.problems:
        if problem.cure == "block" and problem.view is not None and problem.block is not None:
            block = BlockId(problem.view, problem.block)
            place.delete([block.commit_key])
            dropped.add(block)
        elif problem.cure == "metadata":
            rewritten.append(problem.where.removeprefix(f"{place}/"))
    rewritten = list(dict.fromkeys(rewritten))
    add_digests = verification.adds_digests
    if rewritten or add_digests:
        with if_permitted(growing(place)):
            files = local.repaired_metadata(manifest_at(place), verification)
            for name in dict.fromkeys([*rewritten, *([METADATA] if add_digests else [])]):
                place.put(name, json.dumps(files[name], indent=2).encode())
    left = tuple(problem for problem in verification.problems if problem.cure in {"copy", "remove"})
    return Repair(dropped=tuple(sorted(dropped)), rewritten=tuple(rewritten), left=left, digests_added=add_digests)


class _RemoteBlocks:
    """Downloads a remote cache into a folder: metadata and constants at once, a block while it is checked."""

    def __init__(self, place: Place, manifest: Manifest, root: Path) -> None:
        self._place, self._manifest, self._root = place, manifest, root
        self._specs = target_arrays(manifest.recipe, manifest.block_rows)
        layouts = array_layouts(manifest)
        self._limits = {name: layout.max_file_bytes for name, layout in layouts.items()}
        names = (*(spec.name for spec in self._specs), commits.COMMITS)
        for name in names:  # they exist even if they are empty
            (root / name).mkdir(parents=True)
        whole = whole_arrays(manifest)
        keys = [METADATA, *(f"{name}/{METADATA}" for name in layouts)]
        keys += [f"{name}/{chunk}" for name in whole for chunk in layouts[name].chunk_names]
        with ThreadPoolExecutor(WORKERS) as pool, Progress("metadata", len(keys), "files") as progress:
            for _ in pool.map(self._download, keys):
                progress.advance(1)

    def committed(self) -> list[BlockId]:
        return commits.parse_file_names(commit_names(self._place.keys(commits.COMMITS)), self._manifest)

    @contextmanager
    def fetched(self, block: BlockId) -> Iterator[None]:
        keys = [key for spec in self._specs for key in block_files(spec, self._manifest, block)]
        keys.append(block.commit_key)
        try:
            for key in keys:
                self._download(key)
            yield
        finally:
            for key in keys:
                (self._root / key).unlink(missing_ok=True)

    def _download(self, key: str) -> None:
        """Download a file unchanged. Skip a missing one; replace an oversized one by zeros, also oversized."""
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
