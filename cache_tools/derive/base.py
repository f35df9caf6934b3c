"""Make a cache from another one, block by block, without a teacher pass: what recoding and fusing have in common.

An interrupted run can be continued, as a build can, and the new cache grows when its source has grown. A block is
written as soon as the source has its rows and they agree with their commits.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.codecs import CODECS_VERSION
from cache_tools.config import Frozen
from cache_tools.console import Progress
from cache_tools.derive.block_reader import BlockReader
from cache_tools.derive.lineage import Source
from cache_tools.errors import MismatchError, StorageError
from cache_tools.files import SafeFolder
from cache_tools.format.commits import BlockId
from cache_tools.format.manifest import CODE, Manifest, check_code_versions
from cache_tools.format.recipe import FORMAT_VERSION, FUSION_VERSION, CacheRecipe
from cache_tools.home import registry
from cache_tools.places import LocalPlace
from cache_tools.places.claims import Claims, growing, remove_dead_claims
from cache_tools.reader import TeacherCache
from cache_tools.store.writer import CacheWriter, check_free

MAX_WORKERS = 4
CODE_VERSIONS = {"format": FORMAT_VERSION, "fusion": FUSION_VERSION, "codecs": CODECS_VERSION}
_BUILD_ONLY = {"inputs", "grown"}  # by its `inputs`, a build recognises its own cache

Constants = Mapping[str, npt.NDArray[np.float32]]
Convert = Callable[[int, slice], Mapping[str, npt.NDArray[Any]]]


class Derived(Frozen):
    """The result of making a cache from another one.

    Attributes:
        blocks: made now; `blocks_there` existed already, `blocks_missing` are not in the source yet.
    """

    path: Path
    name: str
    fingerprint: str
    source: Path
    source_fingerprint: str
    blocks: int
    blocks_there: int
    blocks_missing: int


def derived_manifest(
    cache: TeacherCache, recipe: CacheRecipe, name: str, *, block_rows: int | None = None, **changes: Any
) -> Manifest:
    """The manifest of a cache that is made from another one: the same images, views and canaries, with provenance.

    Args:
        cache: the source.
        recipe: of the new cache; `derived_from` is set here.
        changes: other fields of the manifest.
    """
    source = cache.manifest
    kept = {key: value for key, value in source.provenance.items() if key not in _BUILD_ONLY}
    recipe = recipe.model_copy(update={"derived_from": source.fingerprint})
    provenance = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "versions": {package: version(package) for package in ("teacher-cache", "torch", "zarr")},
        "source": Source.of(cache).model_dump(mode="json"),
        CODE: CODE_VERSIONS,
    }
    update = {
        "format_version": FORMAT_VERSION,
        "fingerprint": recipe.fingerprint,
        "name": name,
        "recipe": recipe,
        "block_rows": block_rows or source.block_rows,
        "constants_digest": "",
        "provenance": {**kept, **provenance},
    }
    return source.model_copy(update=update | changes)


def derive(
    source: BlockReader,
    path: Path,
    manifest: Manifest,
    constants: Callable[[], Constants],
    convert: Callable[[CacheWriter], Convert],
    *,
    title: str,
) -> Derived:
    """Make the cache of `manifest` at `path`, or continue it.

    Args:
        manifest: of a new cache. An existing cache keeps its own, and grows to as many views.
        constants: returns those of a new cache (`arrays.constant_shapes`); not called for an existing cache.
        convert: given the opened cache, returns the function that converts (view, rows) of the source into stored
            arrays by name.
        title: of the progress bar.

    Raises:
        MismatchError: another cache is at `path`.
        FormatError: a damaged array in the source, and nothing is written; or a damaged block, and blocks written
            before it stay.
        StorageError: storage that is full or read-only.
    """
    source.cache.check_arrays()
    writer = _open_or_create(source, path, manifest, constants)
    manifest = writer.manifest
    missing = writer.missing_blocks()
    ready = [each for each in missing if source.holds(each.view, manifest.block(each.block))]
    total, made = manifest.num_views * manifest.num_blocks, 0
    if ready:
        with Progress(title, total, "blocks", done=total - len(missing)) as progress:
            made = _write_all(source, writer, ready, convert(writer), progress)
            progress.advance(len(ready) - made)  # blocks that others made meanwhile
    else:
        remove_dead_claims(LocalPlace(path))
    return Derived(
        path=path,
        name=manifest.name,
        fingerprint=manifest.fingerprint,
        source=source.cache.path,
        source_fingerprint=source.cache.manifest.fingerprint,
        blocks=made,
        blocks_there=total - len(missing) + len(ready) - made,
        blocks_missing=len(missing) - len(ready),
    )


def require_same_constants(source: BlockReader, made: Constants, names: Iterable[str], path: Path) -> None:
    """Raise MismatchError unless a cache at `path` has bit-identical constants of these names to the source.

    The same cache built on two machines may have heads or embeddings that differ in their last bits.
    """
    for name in sorted(names):
        if not np.array_equal(made[name], source.constants[name]):
            raise MismatchError(
                "this cache was started from another copy of the source, and blocks of both must not be mixed",
                where=path / name,
                next_step="continue it from that copy, or choose another --out",
            )


def _open_or_create(
    source: BlockReader, path: Path, manifest: Manifest, constants: Callable[[], Constants]
) -> CacheWriter:
    if not registry.is_cache(path):
        check_free(path)  # fail before the constants are computed
        cache, found = source.cache, constants()
        try:
            return CacheWriter.create(
                path, manifest, labels=cache.labels, sample_keys=cache.sample_keys, constants=found
            )
        except StorageError:
            if not registry.is_cache(path):
                raise  # else another process has just created the cache
    writer = CacheWriter.resume(path, manifest.fingerprint)
    if writer.manifest.num_views < manifest.num_views or writer.missing_blocks():
        check_code_versions(writer.manifest, CODE_VERSIONS, path)
    if writer.manifest.num_views < manifest.num_views:
        with growing(LocalPlace(path)):
            writer = writer.grow(manifest.num_views, canaries=manifest.canaries)
    return writer


def _write_all(
    source: BlockReader, writer: CacheWriter, blocks: list[BlockId], convert: Convert, progress: Progress
) -> int:
    """Write blocks, a few at a time: checking, encoding and packing release the interpreter lock.

    Processes that make the same cache at the same time share the blocks. Returns how many were written here.
    """

    def is_committed(block: BlockId) -> bool:
        return SafeFolder(writer.path).exists(block.commit_key)

    def write(block: BlockId) -> None:
        view, rows = block.view, writer.manifest.block(block.block)
        writer.write_stored(*block, convert(view, rows), source.parameter_digest(view, rows))
        claims.release(block)

    def finish(count: int) -> None:
        while len(pending) > count:
            pending.pop(0).result()
            progress.advance(1)

    workers, made = min(MAX_WORKERS, os.cpu_count() or 1), 0
    pending: list[Future[None]] = []
    with Claims(LocalPlace(writer.path)) as claims, ThreadPoolExecutor(workers, thread_name_prefix="derive") as pool:
        try:
            for block in claims.share(blocks, lambda: set(filter(is_committed, blocks)), is_committed):
                pending.append(pool.submit(write, block))
                made += 1
                finish(workers)
            finish(0)
        finally:
            pool.shutdown(cancel_futures=True)
    return made
