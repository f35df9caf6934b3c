"""Copy a cache from one place to another, block by block: only what is missing, checked, and resumable.

A block is copied as its chunk files. They are decoded and compared with the block's commit on the way, and the commit
is written last. So the target is a valid, half-built cache at every moment: readers see committed blocks only, and
`build-cache` or the same copy command can continue it. The `zarr.json` of the group, which makes a place a cache, is
written after all other metadata and constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

import numpy as np

from cache_tools.config import Frozen
from cache_tools.console import Progress
from cache_tools.errors import FormatError, StorageError
from cache_tools.files import remove_leftovers
from cache_tools.format import commits
from cache_tools.format.arrays import ArraySpec, target_arrays
from cache_tools.format.commits import BlockId
from cache_tools.format.layout import array_layouts
from cache_tools.format.manifest import Manifest
from cache_tools.places import LocalPlace, Place
from cache_tools.places.arrays import GROUP, SourceArray, damaged_metadata
from cache_tools.places.claims import Claims, growing, if_permitted, remove_dead_claims
from cache_tools.places.metadata import copy_metadata, lacks_metadata, manifest_at, restore_metadata

WORKERS = 8


class CopySummary(Frozen):
    """The result of a copy.

    Attributes:
        blocks: copied now; `blocks_there` were at the target already, `blocks_missing` are not at the source yet.
        restored: damaged arrays at the target that were replaced, by name; `zarr.json` for the group.
        files, bytes: written to the target, metadata included.
    """

    source: str
    target: str
    fingerprint: str
    blocks: int
    blocks_there: int
    blocks_missing: int
    files: int
    bytes: int
    restored: tuple[str, ...] = ()


def copy_cache(source: Place, target: Place, *, views: Sequence[int] | None = None, title: str = "copy") -> CopySummary:
    """Copy everything that `source` has and `target` lacks. A target folder is not pruned meanwhile.

    Whatever is copied is checked on the way. Metadata, labels, sample keys and constants at the target are checked as
    well, and replaced where they are damaged.

    Args:
        views: copy only these; None for all. Metadata, labels, keys and constants are always copied.

    Raises:
        NotFoundError: no cache at `source`.
        MismatchError: another cache at `target`.
        FormatError: a damaged array or block at `source`; blocks copied before it stay.
        StorageError: storage that is full, read-only or unreachable; something that is no cache at `target`; or the
            target was removed during the copy.
    """
    manifest = manifest_at(source)
    needs_metadata = lacks_metadata(target, manifest)
    damaged = damaged_metadata(target, manifest_at(target)) if target.has(GROUP) else {}
    chosen = set(range(manifest.num_views)) & set(range(manifest.num_views) if views is None else views)
    done, available = (
        {each for each in list_committed(place) if each.view in chosen and each.block < manifest.num_blocks}
        for place in (target, source)
    )
    missing, sizes = sorted(available - done), list[int]()
    if needs_metadata or damaged or missing:  # else nothing is written, not even a claim: the target may be read-only
        with _protected(target):
            if isinstance(target, LocalPlace):
                remove_leftovers(target.path)
            if needs_metadata or damaged:
                with if_permitted(growing(target)):  # constants of two builds must not be mixed
                    if damaged:
                        sizes += restore_metadata(source, target, damaged)
                    sizes += copy_metadata(source, target, manifest)
                    for error in damaged_metadata(target, manifest_at(target)).values():
                        raise error
            with Progress(title, len(missing), "blocks") as progress:
                for _, written in copy_blocks(source, target, manifest, missing):
                    sizes += written
                    progress.advance(1, f"{sum(sizes) / 1e6:,.1f} MB")
    elif isinstance(target, LocalPlace):
        remove_dead_claims(target)
    return CopySummary(
        source=str(source),
        target=str(target),
        fingerprint=manifest.fingerprint,
        blocks=len(missing),
        blocks_there=len(done),
        blocks_missing=len(chosen) * manifest.num_blocks - len(available),
        files=len(sizes),
        bytes=sum(sizes),
        restored=tuple(damaged),
    )


def copy_blocks(
    source: Place, target: Place, manifest: Manifest, blocks: Iterable[BlockId]
) -> Iterator[tuple[BlockId, list[int]]]:
    """Copy committed blocks, several at a time, each checked against its commit on the way.

    Args:
        blocks: taken one by one as workers become free, so the iterable may block.

    Yields:
        each block once it is committed at the target, with the sizes of the files written.

    Raises:
        FormatError: a damaged block at `source`; blocks copied before it stay.
        StorageError: storage that is full, read-only or unreachable.
    """
    running: dict[Future[list[int]], BlockId] = {}
    arrays = block_arrays(source, manifest)
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="copy")
    try:
        for block in blocks:
            running[pool.submit(copy_block, source, target, manifest, arrays, block)] = block
            while len(running) >= WORKERS:
                yield from _pop_finished(running)
        while running:
            yield from _pop_finished(running)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def copy_block(
    source: Place, target: Place, manifest: Manifest, arrays: dict[str, SourceArray], block: BlockId
) -> list[int]:
    """Copy one block, checked against its commit; the commit is written last.

    Args:
        arrays: `block_arrays(source, manifest)`.

    Returns:
        sizes of the files written.

    Raises:
        FormatError: a damaged or missing file at `source`; nothing is committed at `target` then.
    """
    specs, sizes = target_arrays(manifest.recipe, manifest.block_rows), []
    try:
        commit = source.read(block.commit_key, arrays[commits.COMMITS].max_file_bytes)
        digests = arrays[commits.COMMITS].decode({block.commit_key: commit}, block)
        rows_of_block = manifest.block(block.block)
        index, size = np.arange(rows_of_block.start, rows_of_block.stop), manifest.recipe.dataset.image_size
        if int(digests[0]) != (manifest.recipe.views.parameter_digest(index, block.view, size) or 1):
            raise FormatError("view parameters are not those of the recipe")
        for column, spec in enumerate(specs, start=1):
            array = arrays[spec.name]
            chunks = {key: source.read(key, array.max_file_bytes) for key in block_files(spec, manifest, block)}
            rows = array.decode(chunks, (block.view, rows_of_block))
            if commits.block_digest(rows) != int(digests[column]):
                raise FormatError("stored rows are not those that were committed", where=f"{source}/{spec.name}")
            for key, data in chunks.items():
                target.put(key, data)
                sizes.append(len(data))
    except FileNotFoundError as error:
        raise _damaged(source, block, "a file is missing") from error
    except FormatError as error:
        raise _damaged(source, block, error.what) from error
    target.put(block.commit_key, commit)
    return [*sizes, len(commit)]


def list_committed(place: Place) -> set[BlockId]:
    """Every committed block, from the names of the commit files."""
    names = (key.rpartition("/")[2] for key in place.keys(commits.COMMITS))
    return {block for name in names if (block := commits.parse_file_name(name)) is not None}


def block_files(spec: ArraySpec, manifest: Manifest, block: BlockId) -> list[str]:
    """Keys of the chunks of one block of one target array."""
    rows = manifest.block(block.block)
    chunks = range(rows.start // spec.chunk_rows, -(-rows.stop // spec.chunk_rows))
    return [f"{spec.name}/c.{block.view}.{chunk}.0" for chunk in chunks]


def block_arrays(source: Place, manifest: Manifest) -> dict[str, SourceArray]:
    """The arrays that blocks consist of, by name: those of the targets, and the commits."""
    names = (commits.COMMITS, *(spec.name for spec in target_arrays(manifest.recipe, manifest.block_rows)))
    layouts = array_layouts(manifest)
    return {name: SourceArray(source, name, layouts[name]) for name in names}


@contextmanager
def _protected(target: Place) -> Iterator[None]:
    """Keep a target folder from being pruned; object stores are never pruned.

    Raises:
        StorageError: on exit, if the cache was removed nevertheless.
    """
    if isinstance(target, LocalPlace):
        with Claims(target) as claims:
            with suppress(StorageError):  # if we may not write beside the cache, nobody else may remove it there
                claims.prevent_pruning()
            yield
    else:
        yield
    if not target.has(GROUP):
        raise StorageError(
            "the cache was removed while it was copied",
            where=target,
            next_step="run the same command again: it copies the removed files again",
        )


def _pop_finished(running: dict[Future[list[int]], BlockId]) -> list[tuple[BlockId, list[int]]]:
    """Wait until some of the jobs are done, and remove them from `running`."""
    done = wait(running, return_when=FIRST_COMPLETED).done
    return [(running.pop(job), job.result()) for job in done]


def _damaged(source: Place, block: BlockId, what: str) -> FormatError:
    return FormatError(
        what,
        where=f"{source}, view {block.view}, block {block.block}",
        next_step=f"remove {block.commit_key} there and rerun the command that made the cache: it restores the block",
    )
