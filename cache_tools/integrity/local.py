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
from pydantic import Field

from cache_tools.config import Frozen
from cache_tools.console import Progress
from cache_tools.errors import CacheError, FormatError, UnsafeFileError
from cache_tools.files import MAX_METADATA_BYTES, SafeFolder, remove_leftovers
from cache_tools.format import commits
from cache_tools.format.arrays import ArraySpec, target_arrays
from cache_tools.format.commits import BlockId
from cache_tools.format.digests import WholeArrays, whole_arrays
from cache_tools.format.layout import array_layouts
from cache_tools.format.manifest import Manifest
from cache_tools.places import LocalPlace
from cache_tools.places.claims import growing, if_permitted
from cache_tools.store.create import UNREADABLE, metadata_difference, metadata_files
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
    """The result of `verify`.

    Attributes:
        path: a folder or a URL.
        bytes: number of decoded bytes that were compared.
        views_dropped: the first views of a rolling cache, which are gone for good; their blocks are no problem.
        has_digests: whether labels, sample keys and constants each have a digest. Caches of earlier versions have one
            digest for several arrays.
        found_digests: the digest of each of them, if all are sound.
    """

    path: Path | str
    fingerprint: str
    blocks: int
    blocks_total: int
    bytes: int
    problems: tuple[Problem, ...]
    views_dropped: int = 0
    has_digests: bool = True
    found_digests: dict[str, str] = Field(default_factory=dict, exclude=True)

    @property
    def sound(self) -> bool:
        """Whether there are no problems; blocks that are not built yet are none."""
        return not self.problems

    @property
    def adds_digests(self) -> bool:
        """Whether `repair` adds the digest of each array: there are none, and the arrays are proven to be sound."""
        return not self.has_digests and bool(self.found_digests)


class Repair(Frozen):
    """The result of `repair`: blocks dropped, metadata files rewritten, and problems that it cannot repair.

    `digests_added`: whether labels, keys and constants had no digests of their own and have them now.
    """

    dropped: tuple[BlockId, ...]
    rewritten: tuple[str, ...]
    left: tuple[Problem, ...]
    digests_added: bool = False


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
    unsound = checker.constant_problems()
    problems += unsound
    proven = all(problem.cure == "metadata" for problem in unsound) and damaged.isdisjoint(whole_arrays(manifest))
    if commits.COMMITS in damaged:
        blocks = []
    else:
        blocks = checker.committed() if source is None else source.committed()

    def check(block: BlockId) -> list[Problem]:
        with nullcontext() if source is None else source.fetched(block):
            return checker.block_problems(block)

    blocks = [block for block in blocks if block.view >= manifest.num_dropped]
    with ThreadPoolExecutor(WORKERS) as pool, Progress("verify", len(blocks), "blocks") as progress:
        for found in pool.map(check, blocks):
            problems += found
            progress.advance(1, f"{len(problems)} problems" if problems else "")
    dropped = (read_manifest(path) if source is None else manifest).num_dropped  # a build may drop views meanwhile
    return Verification(
        path=path,
        fingerprint=manifest.fingerprint,
        blocks=len(blocks),
        blocks_total=manifest.num_views * manifest.num_blocks,
        bytes=checker.bytes,
        problems=tuple(each for each in problems if each.view is None or each.view >= dropped),
        views_dropped=dropped,
        has_digests=bool(manifest.array_digests),
        found_digests=checker.arrays.found if proven else {},
    )


def repair(path: Path, verification: Verification) -> Repair:
    """Drop the commits of damaged blocks and rewrite damaged metadata; nothing sound is touched.

    The command that made the cache then computes only the dropped blocks.
    """
    remove_leftovers(path)
    folder = SafeFolder(path)
    dropped, rewritten = set(), []
    for problem in verification.problems:
        with translate_errors(problem.where):
            if problem.cure == "block" and problem.view is not None and problem.block is not None:
                block = BlockId(problem.view, problem.block)
                folder.remove(block.commit_key)
                dropped.add(block)
            elif problem.cure == "metadata":
                rewritten.append(str(Path(problem.where).relative_to(path)))
    rewritten = list(dict.fromkeys(rewritten))
    add_digests = verification.adds_digests
    if rewritten or add_digests:
        with if_permitted(growing(LocalPlace(path))), translate_errors(path):
            files = repaired_metadata(read_manifest(path), verification)
            for name in dict.fromkeys([*rewritten, *([METADATA] if add_digests else [])]):
                folder.make_folder(name.rpartition("/")[0])  # the whole array may be missing
                folder.put(name, json.dumps(files[name], indent=2).encode())
                folder.sync()
    left = tuple(problem for problem in verification.problems if problem.cure in {"copy", "remove"})
    return Repair(dropped=tuple(sorted(dropped)), rewritten=tuple(rewritten), left=left, digests_added=add_digests)


def repaired_metadata(manifest: Manifest, verification: Verification) -> dict[str, Any]:
    """The contents of every zarr.json, with the digests of the arrays that `verify` found to be sound."""
    if verification.found_digests:
        manifest = manifest.model_copy(update={"array_digests": verification.found_digests})
    return metadata_files(manifest)


class _Checker:
    """Checks the arrays of a cache, except those whose metadata is damaged."""

    def __init__(self, path: Path, manifest: Manifest, damaged: set[str]) -> None:
        self.path, self.manifest, self.bytes = path, manifest, 0
        self.arrays = WholeArrays(manifest)
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
        """Check that labels, keys and constants are readable, finite, and have their digests."""
        problems = []
        for name in whole_arrays(self.manifest):
            if name in self._damaged:
                continue
            try:
                values = read_whole(self._group, self.path, name, self._layouts)
            except UnsafeFileError as error:
                problems.append(_unsafe(error))
            except CacheError as error:
                problems.append(Problem(where=str(self.path / name), what=error.what, cure="copy"))
            else:
                self.bytes += values.nbytes
                self.arrays.add(name, values)
        for mismatch in self.arrays.mismatches():
            where = METADATA if mismatch.sound else mismatch.arrays[0] if len(mismatch.arrays) == 1 else ""
            what = f"{mismatch.what}: expected {mismatch.expected}, found {mismatch.found}"
            problems.append(
                Problem(where=str(self.path / where), what=what, cure="metadata" if mismatch.sound else "copy")
            )
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
        what: str | None
        try:
            what = metadata_difference(name, SafeFolder(path).read_bytes(name, MAX_METADATA_BYTES), expected)
        except FileNotFoundError:
            what = "missing metadata"
        except UnsafeFileError as error:
            yield _unsafe(error, file=file)
            continue
        except (OSError, FormatError):
            what = UNREADABLE
        if what is not None:
            yield Problem(where=str(file), what=what, cure="metadata")


def _unsafe(error: UnsafeFileError, block: BlockId | None = None, *, file: Path | None = None) -> Problem:
    """The problem of a link or a pipe, of which nothing was read."""
    what = f"{error.what}, but {error.found}"
    view, number = (None, None) if block is None else block
    return Problem(where=str(file or error.where), what=what, cure="remove", view=view, block=number)
