"""Copy a cache from one place to another, block by block: only what is missing, checked, and resumable.

A block travels as its chunk files, is decoded and compared with its commit on the way, and gets its commit last. The
target is a valid, half-built cache at every instant: a reader sees committed blocks only, `build-cache` could go on
with it, and the same copy command does. `zarr.json` of the group, which makes a place a cache, is written after all
that it promises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

from cache_tools.config import Frozen
from cache_tools.console import Progress
from cache_tools.errors import FormatError, StorageError
from cache_tools.format import commits
from cache_tools.format.arrays import ArraySpec, target_arrays
from cache_tools.format.layout import array_layouts
from cache_tools.format.manifest import Manifest
from cache_tools.places import LocalPlace, Place
from cache_tools.places.claims import Claims, growing
from cache_tools.places.metadata import GROUP, ChunkFiles, copy_metadata, lacks_metadata, manifest_at

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
    """Bring `target` up to what `source` holds. Meanwhile a folder is not pruned.

    Args:
        views: these only; None for all. Metadata, labels, keys and constants are always copied.

    Raises:
        NotFoundError: no cache at `source`.
        MismatchError: another cache at `target`.
        FormatError: a damaged block in `source`; what was copied before it stays.
        StorageError: storage that is full, read-only or unreachable; something else at `target`, or it was removed
            while it was copied to.
    """
    manifest = manifest_at(source)
    lacking = lacks_metadata(target, manifest)
    chosen = set(range(manifest.num_views)) & set(range(manifest.num_views) if views is None else views)
    done, there = (
        {pair for pair in committed(place) if pair[0] in chosen and pair[1] < manifest.num_blocks}
        for place in (target, source)
    )
    todo, sizes = sorted(there - done), list[int]()
    if lacking or todo:  # else nothing is written, not even a claim: the target may be read-only
        with _kept(target):
            if lacking:
                with _if_permitted(growing(target)):  # constants of two builds must not be mixed
                    sizes += copy_metadata(source, target, manifest)
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
    arrays = block_arrays(source, manifest)
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="copy")
    try:
        for pair in pairs:
            running[pool.submit(copy_block, source, target, manifest, arrays, *pair)] = pair
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


def committed(place: Place) -> set[Pair]:
    """(view, block) of every committed block, from the names of the commit files."""
    found = (commits.parse_file_name(key.rpartition("/")[2]) for key in place.keys(commits.COMMITS))
    return {pair for pair in found if pair is not None}


def block_files(spec: ArraySpec, manifest: Manifest, view: int, block: int) -> list[str]:
    """Keys of the chunks of one block of one target array."""
    rows = manifest.block(block)
    chunks = range(rows.start // spec.chunk_rows, -(-rows.stop // spec.chunk_rows))
    return [f"{spec.name}/c.{view}.{chunk}.0" for chunk in chunks]


@contextmanager
def _if_permitted(claim: AbstractContextManager[None]) -> Iterator[None]:
    """Hold a claim, unless nothing may be written beside the target: a mounted folder may be all that is ours."""
    with ExitStack() as stack:
        with suppress(StorageError):
            stack.enter_context(claim)
        yield


@contextmanager
def _kept(target: Place) -> Iterator[None]:
    """Keep a folder from being pruned, beside others who do: by a claim of one's own. Stores are never pruned.

    Raises:
        StorageError: in the end, if the cache is gone: removed by other means.
    """
    if isinstance(target, LocalPlace):
        with Claims(target) as claims:
            with suppress(StorageError):  # what may not be written beside the cache, may not be removed there either
                claims.keep()
            yield
    else:
        yield
    if not target.has(GROUP):
        raise StorageError(
            "the cache was removed while it was copied",
            where=target,
            next_step="run the same command again: it copies what is gone",
        )


def block_arrays(source: Place, manifest: Manifest) -> dict[str, ChunkFiles]:
    """The arrays that blocks consist of, commits included, by name."""
    names = (commits.COMMITS, *(spec.name for spec in target_arrays(manifest.recipe, manifest.block_rows)))
    return {name: ChunkFiles(source, name, layout) for name, layout in array_layouts(manifest).items() if name in names}


def copy_block(
    source: Place, target: Place, manifest: Manifest, arrays: dict[str, ChunkFiles], view: int, block: int
) -> list[int]:
    """Copy one block, checked against its commit, which goes last.

    Args:
        arrays: `block_arrays(source, manifest)`.

    Returns:
        sizes of the files written.

    Raises:
        FormatError: a damaged or missing file at `source`; nothing is committed at `target` then.
    """
    commit_key = f"{commits.COMMITS}/{commits.file_name(view, block)}"
    specs, sizes = target_arrays(manifest.recipe, manifest.block_rows), []
    try:
        commit = source.read(commit_key, arrays[commits.COMMITS].max_file_bytes)
        digests = arrays[commits.COMMITS].decode({commit_key: commit}, (view, block))
        for column, spec in enumerate(specs, start=1):
            array = arrays[spec.name]
            chunks = {key: source.read(key, array.max_file_bytes) for key in block_files(spec, manifest, view, block)}
            if commits.block_digest(array.decode(chunks, (view, manifest.block(block)))) != int(digests[column]):
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


def _damaged(source: Place, view: int, block: int, what: str, commit_key: str) -> FormatError:
    return FormatError(
        what,
        where=f"{source}, view {view}, block {block}",
        next_step=f"remove {commit_key} there and run the command again that made this cache: it makes the block again",
    )
