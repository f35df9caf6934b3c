"""Copy a cache from one place to another, block by block: only what is missing, checked, and resumable.

A block travels as its chunk files, is decoded and compared with its commit on the way, and gets its commit last. The
target is a valid, half-built cache at every instant: a reader sees committed blocks only, `build-cache` could go on
with it, and the same copy command does. `zarr.json` of the group, which makes a place a cache, is written after all
that it promises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from cache_tools import commits
from cache_tools.array_layout import Layouts, array_layouts
from cache_tools.arrays import ArraySpec, constant_shapes, target_arrays
from cache_tools.config import Frozen
from cache_tools.console import Progress
from cache_tools.errors import FormatError, MismatchError, NotFoundError
from cache_tools.format import MANIFEST_KEY, Manifest, parse_manifest
from cache_tools.place import Place

GROUP = "zarr.json"
WORKERS = 8

Pair = tuple[int, int]


class Moved(Frozen):
    """What a copy did.

    Attributes:
        blocks: copied now; `blocks_there` were in the target already, `blocks_missing` are not in the source either.
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


def copy_cache(source: Place, target: Place, *, views: Sequence[int] | None = None, title: str = "copy") -> Moved:
    """Bring `target` up to what `source` holds.

    Args:
        views: these only; None for all. Metadata, labels, keys and constants are always copied.

    Raises:
        NotFoundError: no cache at `source`.
        MismatchError: another cache at `target`.
        FormatError: a damaged block in `source`; what was copied before it stays.
        StorageError: storage that is full, read-only or unreachable.
    """
    manifest = manifest_at(source)
    sizes = copy_metadata(source, target, manifest)
    chosen = set(range(manifest.num_views)) & set(range(manifest.num_views) if views is None else views)
    done, there = (
        {pair for pair in committed(place) if pair[0] in chosen and pair[1] < manifest.num_blocks}
        for place in (target, source)
    )
    todo = sorted(there - done)
    with Progress(title, len(todo), "blocks") as progress:
        for _, written in copy_blocks(source, target, manifest, todo):
            sizes += written
            progress.advance(1, f"{sum(sizes) / 1e6:,.1f} MB")
    return Moved(
        source=str(source),
        target=str(target),
        fingerprint=manifest.fingerprint,
        blocks=len(todo),
        blocks_there=len(done),
        blocks_missing=len(chosen) * manifest.num_blocks - len(there),
        files=len(sizes),
        bytes=sum(sizes),
    )


def copy_blocks(
    source: Place, target: Place, manifest: Manifest, pairs: Iterable[Pair]
) -> Iterator[tuple[Pair, list[int]]]:
    """Copy committed blocks, several at a time, each checked against its commit on the way.

    Args:
        pairs: (view, block) of each; taken one by one as there is room, so it may wait for something.

    Returns:
        each block when it is committed at the target, with the sizes of the files written.

    Raises:
        FormatError: a block that is damaged at `source`; what was copied before it stays.
        StorageError: storage that is full, read-only or unreachable.
    """
    running: dict[Future[list[int]], Pair] = {}
    names = (commits.COMMITS, *(spec.name for spec in target_arrays(manifest.recipe, manifest.block_rows)))
    metadata = {name: _read(source, f"{name}/{GROUP}") for name in names}
    layouts = array_layouts(manifest)
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="copy")
    try:
        for pair in pairs:
            running[pool.submit(_copy_block, source, target, manifest, layouts, metadata, *pair)] = pair
            while len(running) >= WORKERS:
                yield from _finished(running)
        while running:
            yield from _finished(running)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(running: dict[Future[list[int]], Pair]) -> list[tuple[Pair, list[int]]]:
    """Wait for some of the jobs, and take them out."""
    done = wait(running, return_when=FIRST_COMPLETED).done
    return [(running.pop(job), job.result()) for job in done]


def manifest_at(place: Place) -> Manifest:
    """The manifest of the cache at a place.

    Raises:
        NotFoundError: no cache there.
        FormatError: a damaged or foreign one.
    """
    try:
        text = place.read(GROUP)
    except FileNotFoundError as error:
        raise NotFoundError("no cache here", where=place, next_step="check the path or URL") from error
    try:
        attributes = json.loads(text)["attributes"][MANIFEST_KEY]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError("not a teacher cache, or a damaged one", where=f"{place}/{GROUP}") from error
    return parse_manifest(attributes, where=str(place))


def committed(place: Place) -> set[Pair]:
    """(view, block) of every committed block, from the names of the commit files."""
    found = (commits.parse_file_name(key.rpartition("/")[2]) for key in place.keys(commits.COMMITS))
    return {pair for pair in found if pair is not None}


def block_files(spec: ArraySpec, manifest: Manifest, view: int, block: int) -> list[str]:
    """Keys of the chunks of one block of one target array."""
    rows = manifest.block(block)
    chunks = range(rows.start // spec.chunk_rows, -(-rows.stop // spec.chunk_rows))
    return [f"{spec.name}/c.{view}.{chunk}.0" for chunk in chunks]


def copy_metadata(source: Place, target: Place, manifest: Manifest) -> list[int]:
    """Everything but blocks; the group's zarr.json last, and only if the target lacks it or promises fewer views.

    Returns:
        sizes of the files written.

    Raises:
        MismatchError: another cache at `target`, or the same one in blocks of another size.
    """
    try:
        existing = manifest_at(target)
    except NotFoundError:
        existing = None
    if existing is not None and existing.fingerprint != manifest.fingerprint:
        raise MismatchError(
            "another cache is at the target",
            where=target,
            expected=f"nothing, or fingerprint {manifest.fingerprint[:12]}",
            found=existing.fingerprint[:12],
            next_step="choose another target",
        )
    if existing is not None and existing.block_rows != manifest.block_rows:
        raise MismatchError(
            "the same cache is at the target, in blocks of another size",
            where=target,
            expected=f"{manifest.block_rows} rows per block",
            found=existing.block_rows,
            next_step="choose another target, or remove that cache first",
        )
    if existing is not None and existing.constants_digest != manifest.constants_digest:
        raise MismatchError(
            "the same cache is at the target, built beside this one: its head or class embeddings differ in their last "
            "bits, and blocks of both must not be mixed",
            where=target,
            expected=f"constants {manifest.constants_digest[:12]}",
            found=existing.constants_digest[:12],
            next_step="take that cache (pull it), choose another target, or remove it first",
        )
    if existing is not None and existing.num_views >= manifest.num_views:
        return []
    whole = ("labels", "sample_keys", *constant_shapes(manifest.recipe))
    arrays = (*(spec.name for spec in target_arrays(manifest.recipe, manifest.block_rows)), commits.COMMITS)
    keys = [key for name in whole for key in _files_of(source, name)] if existing is None else []
    keys += [f"{name}/{GROUP}" for name in arrays]
    sizes = []
    with ThreadPoolExecutor(WORKERS) as pool, Progress("metadata", len(keys), "files") as progress:
        for size in pool.map(lambda key: _copy_file(source, target, key), keys):
            sizes.append(size)
            progress.advance(1, f"{sum(sizes) / 1e6:,.1f} MB")
    return [*sizes, _copy_file(source, target, GROUP)]


def _copy_block(
    source: Place,
    target: Place,
    manifest: Manifest,
    layouts: Layouts,
    metadata: dict[str, bytes],
    view: int,
    block: int,
) -> list[int]:
    """Copy one block, its commit last; gives the sizes of the files written. `metadata`: zarr.json of each array."""
    commit_key = f"{commits.COMMITS}/{commits.file_name(view, block)}"
    sizes = []
    try:
        commit = source.read(commit_key)
        digests = _decode(source, commits.COMMITS, layouts, metadata, {commit_key: commit}, (view, block))
        for column, spec in enumerate(target_arrays(manifest.recipe, manifest.block_rows), start=1):
            chunks = {key: source.read(key) for key in block_files(spec, manifest, view, block)}
            rows = _decode(source, spec.name, layouts, metadata, chunks, (view, manifest.block(block)))
            if commits.block_digest(rows) != int(digests[column]):
                raise FormatError("stored rows are not those that were committed", where=f"{source}/{spec.name}")
            for key, data in chunks.items():
                target.put(key, data)
                sizes.append(len(data))
    except FileNotFoundError as error:
        raise _damaged(source, view, block, "a file is missing", commit_key) from error
    except FormatError as error:
        raise _damaged(source, view, block, error.what, commit_key) from error
    target.put(commit_key, commit)
    return [*sizes, len(commit)]


def _decode(
    source: Place, name: str, layouts: Layouts, metadata: dict[str, bytes], chunks: dict[str, bytes], selection: Any
) -> np.ndarray:
    """The rows in some chunk files of an array, through zarr and the array's own codecs, which are those promised."""
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    from cache_tools.bounded import checked
    from cache_tools.store import quiet_numcodecs, translated

    quiet_numcodecs()
    buffer = default_buffer_prototype().buffer
    files = {key: buffer.from_bytes(data) for key, data in chunks.items()}
    files[f"{name}/{GROUP}"] = buffer.from_bytes(metadata[name])
    with translated(f"{source}/{name}"):
        array: Any = zarr.open_array(MemoryStore(files), path=name, mode="r", zarr_format=3)
        return np.asarray(checked(array, layouts[name], f"{source}/{name}")[selection])


def _files_of(source: Place, name: str) -> list[str]:
    """Keys of the metadata and the chunks of an array. Whatever else is in its folder does not travel."""
    own = re.compile(rf"{re.escape(name)}/(zarr[.]json|c([.][0-9]+)+)")
    return [entry.key for entry in source.entries(name) if own.fullmatch(entry.key)]


def _copy_file(source: Place, target: Place, key: str) -> int:
    data = _read(source, key)
    target.put(key, data)
    return len(data)


def _read(source: Place, key: str) -> bytes:
    try:
        return source.read(key)
    except FileNotFoundError as error:
        raise FormatError("missing file", where=f"{source}/{key}", next_step="build the cache again") from error


def _damaged(source: Place, view: int, block: int, what: str, commit_key: str) -> FormatError:
    return FormatError(
        what,
        where=f"{source}, view {view}, block {block}",
        next_step=f"remove {commit_key} there and run the same build-cache command: it computes the block again",
    )
