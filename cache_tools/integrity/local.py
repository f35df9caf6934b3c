"""Is every stored byte what was committed? Find what is not and drop it, so that a build redoes just that.

`verify` reads everything: the manifest against its digest, the metadata of every array against what this version would
write, labels, keys and constants, and each committed block against its commit, the digest of its view parameters
included.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import zarr

from cache_tools.config import Frozen
from cache_tools.console import Progress
from cache_tools.errors import CacheError, FormatError
from cache_tools.files import MAX_METADATA_BYTES, check_file, put_durably, sync_folder
from cache_tools.format import commits
from cache_tools.format.arrays import ArraySpec, constant_shapes, target_arrays
from cache_tools.format.commits import BlockId
from cache_tools.format.layout import array_layouts
from cache_tools.format.manifest import Manifest
from cache_tools.store.create import constants_digest, metadata_files
from cache_tools.store.group import check_chunks, open_array, open_group, read_manifest, read_whole, translated

WORKERS = 8
METADATA = "zarr.json"


Cure = Literal["block", "metadata", "copy"]


class Problem(Frozen):
    """One thing that is not as it should be.

    Attributes:
        cure: `block`: drop the commit and build the block again; `metadata`: write it anew from the manifest; `copy`:
            only a copy of the cache, or building it again, helps.
    """

    where: str
    what: str
    cure: Cure
    view: int | None = None
    block: int | None = None


class Verification(Frozen):
    """What `verify` found. `path` is a folder or a URL; `bytes` counts decoded bytes that were read and compared."""

    path: Path | str
    fingerprint: str
    blocks: int
    blocks_total: int
    bytes: int
    problems: tuple[Problem, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong; blocks that are not built yet are not wrong."""
        return not self.problems


class Repair(Frozen):
    """What `repair` did: blocks dropped, metadata written anew, and problems that it cannot cure."""

    dropped: tuple[BlockId, ...]
    rewritten: tuple[str, ...]
    left: tuple[Problem, ...]


class Blocks(Protocol):
    """Blocks that are not in the folder of a cache until they are checked."""

    def committed(self) -> list[BlockId]:
        """(view, block) of those there are, ascending."""

    def at_hand(self, view: int, block: int) -> AbstractContextManager[None]:
        """Have the files of one in the folder for the time of a `with` block. Several threads ask at once."""


def verify(path: Path, blocks: Blocks | None = None) -> Verification:
    """Check every stored byte of a cache, complete or half-built.

    Args:
        blocks: where the blocks are, if not in the folder.

    Raises:
        NotFoundError, FormatError: no cache, or a manifest so damaged that nothing else can be checked.
    """
    manifest = read_manifest(path)
    problems = list(_metadata_problems(path, manifest))
    damaged = {Path(problem.where).parent.name for problem in problems}
    reader = _Reader(path, manifest, damaged)
    problems += reader.constant_problems()
    listed = [] if commits.COMMITS in damaged else reader.committed() if blocks is None else blocks.committed()

    def check(block: BlockId) -> list[Problem]:
        with nullcontext() if blocks is None else blocks.at_hand(*block):
            return reader.block_problems(*block)

    with ThreadPoolExecutor(WORKERS) as pool, Progress("verify", len(listed), "blocks") as progress:
        for found in pool.map(check, listed):
            problems += found
            progress.advance(1, f"{len(problems)} problems" if problems else "")
    return Verification(
        path=path,
        fingerprint=manifest.fingerprint,
        blocks=len(listed),
        blocks_total=manifest.num_views * manifest.num_blocks,
        bytes=reader.bytes,
        problems=tuple(problems),
    )


def repair(path: Path, verification: Verification) -> Repair:
    """Drop the commits of bad blocks and write damaged metadata anew; nothing sound is touched.

    The same `build-cache` command then computes just those blocks.
    """
    manifest = read_manifest(path)
    dropped, rewritten = set(), []
    expected: dict[str, Any] = {}
    for problem in verification.problems:
        with translated(problem.where):
            if problem.cure == "block" and problem.view is not None and problem.block is not None:
                (path / BlockId(problem.view, problem.block).commit_key).unlink(missing_ok=True)
                dropped.add(BlockId(problem.view, problem.block))
            elif problem.cure == "metadata":
                expected = expected or metadata_files(manifest)
                name = str(Path(problem.where).relative_to(path))
                (path / name).parent.mkdir(exist_ok=True)  # the whole array may be gone
                put_durably(path / name, json.dumps(expected[name], indent=2).encode())
                sync_folder(path)
                rewritten.append(name)
    left = tuple(problem for problem in verification.problems if problem.cure == "copy")
    return Repair(dropped=tuple(sorted(dropped)), rewritten=tuple(rewritten), left=left)


class _Reader:
    """The arrays of a cache, except those whose metadata is damaged."""

    def __init__(self, path: Path, manifest: Manifest, damaged: set[str]) -> None:
        self.path, self.manifest, self.bytes = path, manifest, 0
        self._lock = threading.Lock()
        self._layouts, self._damaged = array_layouts(manifest), damaged
        self._group = open_group(path, self._layouts)
        self._specs = target_arrays(manifest.recipe, manifest.block_rows)
        names = [*(spec.name for spec in self._specs), commits.COMMITS]
        self._arrays: dict[str, zarr.Array[Any]] = {
            name: open_array(self._group, path, name, self._layouts) for name in names if name not in damaged
        }

    def committed(self) -> list[BlockId]:
        """Blocks with a commit file."""
        with translated(self.path / commits.COMMITS):
            return commits.parse_file_names(os.listdir(self.path / commits.COMMITS), self.manifest)

    def constant_problems(self) -> list[Problem]:
        """Labels, keys and constants: readable, finite, and those of the recipe."""
        found: dict[str, Any] = {}
        problems, shapes = [], constant_shapes(self.manifest.recipe)
        for name in ("labels", "sample_keys", *shapes):
            if name in self._damaged:
                continue
            try:
                found[name] = read_whole(self._group, self.path, name, self._layouts)
                self.bytes += found[name].nbytes
            except CacheError as error:
                problems.append(Problem(where=str(self.path / name), what=error.what, cure="copy"))
        constants = {name: found[name] for name in shapes if name in found}
        expected = self.manifest.constants_digest
        if constants.keys() == shapes.keys() and constants_digest(constants) != expected:
            what = "the arrays that hold for all samples are not those that the manifest was written for"
            problems.append(Problem(where=str(self.path), what=what, cure="copy"))
        identity = self.manifest.recipe.dataset
        if {"labels", "sample_keys"} <= found.keys():
            digest = commits.content_digest(found["sample_keys"], found["labels"], identity.class_names)
            if digest != identity.content_digest:
                what = "labels or sample keys are not those of the recipe"
                problems.append(Problem(where=str(self.path / "labels"), what=what, cure="copy"))
        return problems

    def block_problems(self, view: int, block: int) -> list[Problem]:
        """One committed block: its commit, then the rows of each array."""

        def problem(name: str, what: str) -> Problem:
            return Problem(where=str(self.path / name), what=what, cure="block", view=view, block=block)

        table = self._arrays[commits.COMMITS]
        try:
            digests = self._read(table, (view, block)).tolist()
        except CacheError as error:
            return [problem(BlockId(view, block).commit_key, f"damaged commit: {error.what}")]
        problems = []
        if digests[0] != self._parameter_digest(view, block):
            problems.append(problem(commits.COMMITS, "view parameters are not those of the recipe"))
        for spec, digest in zip(self._specs, digests[1:], strict=True):
            if spec.name in self._damaged:
                continue
            if what := self._rows_trouble(spec, view, block, digest):
                problems.append(problem(spec.name, what))
        return problems

    def _rows_trouble(self, spec: ArraySpec, view: int, block: int, digest: int) -> str | None:
        selected = self.manifest.block(block)
        try:
            check_chunks(spec, self.manifest, self.path, view, selected.start, selected.stop)
            rows = self._read(self._arrays[spec.name], (view, selected))
        except CacheError as error:
            return error.what
        if not np.isfinite(rows).all():
            return "a number is not finite, or a chunk is missing"
        return None if commits.block_digest(rows) == digest else "stored rows are not those that were committed"

    def _parameter_digest(self, view: int, block: int) -> int:
        rows, recipe = self.manifest.block(block), self.manifest.recipe
        return recipe.views.parameter_digest(np.arange(rows.start, rows.stop), view, recipe.dataset.image_size) or 1

    def _read(self, array: Any, selection: Any) -> np.ndarray:
        with translated(self.path):
            values = np.asarray(array[selection])
        with self._lock:
            self.bytes += values.nbytes
        return values


def _metadata_problems(path: Path, manifest: Manifest) -> Iterator[Problem]:
    """zarr.json of the group and of every array, field by field."""
    for name, expected in metadata_files(manifest).items():
        file = path / name
        try:
            check_file(file, MAX_METADATA_BYTES)
            found = json.loads(file.read_bytes())
            if not isinstance(found, dict):
                raise ValueError("not an object")
        except FileNotFoundError:
            yield Problem(where=str(file), what="missing metadata", cure="metadata")
            continue
        except (OSError, ValueError, RecursionError, FormatError):
            yield Problem(where=str(file), what="metadata that cannot be read", cure="metadata")
            continue
        if name == METADATA:  # the manifest in it has a digest of its own
            found, expected = ({**each, "attributes": sorted(each["attributes"])} for each in (found, expected))
        elif _longer(found, expected):  # a build that was growing the cache has not written its promise yet
            found = found | {"shape": expected["shape"]}
        if found != expected:
            keys = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
            what = f"metadata is not what it should be: {', '.join(keys)}"
            yield Problem(where=str(file), what=what, cure="metadata")


def _longer(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether an array has the promised shape with more views."""
    if not isinstance(found.get("shape"), list) or not found["shape"]:
        return False
    first, wanted = found["shape"][0], expected["shape"]
    return found["shape"][1:] == wanted[1:] and isinstance(first, int) and first > wanted[0]
