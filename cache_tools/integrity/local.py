"""Check that every stored byte is what was committed, and drop damaged blocks, so that a build redoes only those.

`verify` reads everything: the manifest against its digest, the metadata of every array against what this version would
write, labels, keys and constants, and each committed block against its commit, including the digest of its view
parameters.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import zarr

from cache_tools.config import Frozen
from cache_tools.console import Progress
from cache_tools.errors import CacheError, FormatError, UnsafeFileError
from cache_tools.files import MAX_METADATA_BYTES, SafeFolder
from cache_tools.format import commits
from cache_tools.format.arrays import ArraySpec, constant_shapes, target_arrays
from cache_tools.format.commits import BlockId
from cache_tools.format.layout import array_layouts
from cache_tools.format.manifest import Manifest
from cache_tools.store.create import constants_digest, metadata_files
from cache_tools.store.group import check_chunks, open_array, open_group, read_manifest, read_whole, translate_errors

WORKERS = 8
METADATA = "zarr.json"

Cure = Literal["block", "metadata", "copy", "remove"]


class Problem(Frozen):
    """One problem that `verify` found.

    Attributes:
        cure: `block`: drop the commit and compute the block again; `metadata`: rewrite it from the manifest; `copy`:
            only a copy of the cache or a new build helps; `remove`: a link or a pipe, which only the user removes.
    """

    where: str
    what: str
    cure: Cure
    view: int | None = None
    block: int | None = None


class Verification(Frozen):
    """The result of `verify`. `path` is a folder or a URL; `bytes` counts the decoded bytes that were compared."""

    path: Path | str
    fingerprint: str
    blocks: int
    blocks_total: int
    bytes: int
    problems: tuple[Problem, ...]

    @property
    def sound(self) -> bool:
        """Whether there are no problems; blocks that are not built yet are none."""
        return not self.problems


class Repair(Frozen):
    """The result of `repair`: blocks dropped, metadata files rewritten, and problems that it cannot repair."""

    dropped: tuple[BlockId, ...]
    rewritten: tuple[str, ...]
    left: tuple[Problem, ...]


class BlockSource(Protocol):
    """A source of blocks that are not in the folder of the cache."""

    def committed(self) -> list[BlockId]:
        """The committed blocks, ascending."""

    def fetched(self, block: BlockId) -> AbstractContextManager[None]:
        """Keep the files of a block in the folder inside a `with` block. Called from several threads."""


def verify(path: Path, source: BlockSource | None = None) -> Verification:
    """Check every stored byte of a cache, complete or half-built.

    Args:
        source: where the blocks are, if not in the folder.

    Raises:
        NotFoundError, FormatError: no cache, or a manifest so damaged that nothing else can be checked.
    """
    manifest = read_manifest(path)
    problems = list(_metadata_problems(path, manifest))
    damaged = {Path(problem.where).parent.name for problem in problems}
    checker = _Checker(path, manifest, damaged)
    problems += checker.constant_problems()
    if commits.COMMITS in damaged:
        blocks = []
    else:
        blocks = checker.committed() if source is None else source.committed()

    def check(block: BlockId) -> list[Problem]:
        with nullcontext() if source is None else source.fetched(block):
            return checker.block_problems(block)

    with ThreadPoolExecutor(WORKERS) as pool, Progress("verify", len(blocks), "blocks") as progress:
        for found in pool.map(check, blocks):
            problems += found
            progress.advance(1, f"{len(problems)} problems" if problems else "")
    return Verification(
        path=path,
        fingerprint=manifest.fingerprint,
        blocks=len(blocks),
        blocks_total=manifest.num_views * manifest.num_blocks,
        bytes=checker.bytes,
        problems=tuple(problems),
    )


def repair(path: Path, verification: Verification) -> Repair:
    """Drop the commits of damaged blocks and rewrite damaged metadata; nothing sound is touched.

    The command that made the cache then computes only the dropped blocks.
    """
    manifest, folder = read_manifest(path), SafeFolder(path)
    dropped, rewritten = set(), []
    expected: dict[str, Any] = {}
    for problem in verification.problems:
        with translate_errors(problem.where):
            if problem.cure == "block" and problem.view is not None and problem.block is not None:
                block = BlockId(problem.view, problem.block)
                folder.remove(block.commit_key)
                dropped.add(block)
            elif problem.cure == "metadata":
                expected = expected or metadata_files(manifest)
                name = str(Path(problem.where).relative_to(path))
                folder.make_folder(name.rpartition("/")[0])  # the whole array may be missing
                folder.put(name, json.dumps(expected[name], indent=2).encode())
                folder.sync()
                rewritten.append(name)
    left = tuple(problem for problem in verification.problems if problem.cure in {"copy", "remove"})
    return Repair(dropped=tuple(sorted(dropped)), rewritten=tuple(rewritten), left=left)


class _Checker:
    """Checks the arrays of a cache, except those whose metadata is damaged."""

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
        """Blocks that have a commit file."""
        with translate_errors(self.path / commits.COMMITS):
            return commits.parse_file_names(SafeFolder(self.path).names(commits.COMMITS), self.manifest)

    def constant_problems(self) -> list[Problem]:
        """Check that labels, keys and constants are readable, finite, and those of the recipe."""
        found: dict[str, Any] = {}
        problems, shapes = [], constant_shapes(self.manifest.recipe)
        for name in ("labels", "sample_keys", *shapes):
            if name in self._damaged:
                continue
            try:
                found[name] = read_whole(self._group, self.path, name, self._layouts)
                self.bytes += found[name].nbytes
            except UnsafeFileError as error:
                problems.append(_unsafe(error))
            except CacheError as error:
                problems.append(Problem(where=str(self.path / name), what=error.what, cure="copy"))
        constants = {name: found[name] for name in shapes if name in found}
        expected = self.manifest.constants_digest
        if expected and constants.keys() == shapes.keys() and constants_digest(constants) != expected:
            what = "the constants are not those of the manifest"
            problems.append(Problem(where=str(self.path), what=what, cure="copy"))
        identity = self.manifest.recipe.dataset
        if {"labels", "sample_keys"} <= found.keys():
            digest = commits.content_digest(found["sample_keys"], found["labels"], identity.class_names)
            if digest != identity.content_digest:
                what = "labels or sample keys are not those of the recipe"
                problems.append(Problem(where=str(self.path / "labels"), what=what, cure="copy"))
        return problems

    def block_problems(self, block: BlockId) -> list[Problem]:
        """Check one committed block: its commit, then its rows of each array."""

        def problem(name: str, what: str) -> Problem:
            return Problem(where=str(self.path / name), what=what, cure="block", view=block.view, block=block.block)

        try:
            digests = self._read(self._arrays[commits.COMMITS], block).tolist()
        except UnsafeFileError as error:
            return [_unsafe(error, block)]
        except CacheError as error:
            return [problem(block.commit_key, f"damaged commit: {error.what}")]
        problems = []
        if digests[0] != self._parameter_digest(block):
            problems.append(problem(commits.COMMITS, "view parameters are not those of the recipe"))
        for spec, digest in zip(self._specs, digests[1:], strict=True):
            if spec.name in self._damaged:
                continue
            try:
                if what := self._row_problem(spec, block, digest):
                    problems.append(problem(spec.name, what))
            except UnsafeFileError as error:
                problems.append(_unsafe(error, block))
        return problems

    def _row_problem(self, spec: ArraySpec, block: BlockId, digest: int) -> str | None:
        selected = self.manifest.block(block.block)
        try:
            check_chunks(spec, self.manifest, self.path, block.view, selected.start, selected.stop)
            rows = self._read(self._arrays[spec.name], (block.view, selected))
        except UnsafeFileError:
            raise
        except CacheError as error:
            return error.what
        if not np.isfinite(rows).all():
            return "a number is not finite, or a chunk is missing"
        return None if commits.block_digest(rows) == digest else "stored rows are not those that were committed"

    def _parameter_digest(self, block: BlockId) -> int:
        rows, recipe = self.manifest.block(block.block), self.manifest.recipe
        index = np.arange(rows.start, rows.stop)
        return recipe.views.parameter_digest(index, block.view, recipe.dataset.image_size) or 1

    def _read(self, array: Any, selection: Any) -> npt.NDArray[Any]:
        with translate_errors(self.path):
            values = np.asarray(array[selection])
        with self._lock:
            self.bytes += values.nbytes
        return values


def _metadata_problems(path: Path, manifest: Manifest) -> Iterator[Problem]:
    """Check the zarr.json of the group and of every array, field by field."""
    for name, expected in metadata_files(manifest).items():
        file = path / name
        try:
            found = json.loads(SafeFolder(path).read_bytes(name, MAX_METADATA_BYTES))
            if not isinstance(found, dict):
                raise ValueError("not an object")
        except FileNotFoundError:
            yield Problem(where=str(file), what="missing metadata", cure="metadata")
            continue
        except UnsafeFileError as error:
            yield _unsafe(error, file=file)
            continue
        except (OSError, ValueError, RecursionError, FormatError):
            yield Problem(where=str(file), what="metadata that cannot be read", cure="metadata")
            continue
        if name == METADATA:  # the manifest in it has a digest of its own
            found, expected = ({**each, "attributes": sorted(each["attributes"])} for each in (found, expected))
        elif _has_more_views(found, expected):  # a build is growing the cache and has not written its manifest yet
            found = found | {"shape": expected["shape"]}
        if found != expected:
            keys = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
            what = f"metadata differs from what the manifest requires: {', '.join(keys)}"
            yield Problem(where=str(file), what=what, cure="metadata")


def _unsafe(error: UnsafeFileError, block: BlockId | None = None, *, file: Path | None = None) -> Problem:
    """The problem of a link or a pipe, of which nothing was read."""
    what = f"{error.what}, but {error.found}"
    view, number = (None, None) if block is None else block
    return Problem(where=str(file or error.where), what=what, cure="remove", view=view, block=number)


def _has_more_views(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether an array has the expected shape but for more views."""
    if not isinstance(found.get("shape"), list) or not found["shape"]:
        return False
    first, wanted = found["shape"][0], expected["shape"]
    return found["shape"][1:] == wanted[1:] and isinstance(first, int) and first > wanted[0]
