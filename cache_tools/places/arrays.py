"""Read arrays of a cache at a place as files, decoded and compared with their digests on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from cache_tools.errors import FormatError, UnsafeFileError
from cache_tools.files import MAX_METADATA_BYTES
from cache_tools.format.digests import RESTORE_ARRAY, WholeArrays, whole_arrays
from cache_tools.format.layout import ArrayLayout, Layouts, array_layouts
from cache_tools.format.manifest import Manifest
from cache_tools.lazy import np
from cache_tools.places import Place

if TYPE_CHECKING:
    import numpy.typing as npt

GROUP = "zarr.json"
WORKERS = 8
BATCH_BYTES = 32 << 20  # arrays that are read at the same time
REWRITE = "`cache-tools repair` of that cache rewrites it from the manifest"

Files = dict[str, bytes]


class WholeArray(NamedTuple):
    """An array that was read whole: the contents of its chunk files by key, and its digest."""

    name: str
    files: Files
    digest: str


def read_file(source: Place, key: str, limit: int) -> bytes:
    """Read a file that a cache must have, of at most `limit` bytes.

    Raises:
        FormatError: missing or larger.
    """
    try:
        return source.read(key, limit)
    except FileNotFoundError as error:
        raise FormatError("missing file", where=f"{source}/{key}", next_step="build the cache again") from error


def read_metadata(source: Place, expected: Mapping[str, dict[str, Any]]) -> Files:
    """Read the zarr.json files of a cache.

    Args:
        expected: their contents by key, from `store.create.metadata_files`.

    Raises:
        FormatError: one is missing, or differs from what the manifest requires.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        found = pool.map(lambda key: _read_metadata(source, key, expected[key]), expected)
        return dict(zip(expected, found, strict=True))


def check_metadata(source: Place, key: str, data: bytes, expected: dict[str, Any]) -> None:
    """Raise FormatError unless the bytes of a zarr.json have the expected contents."""
    from cache_tools.store.create import metadata_difference  # imports zarr

    if what := metadata_difference(key, data, expected):
        raise FormatError(what, where=f"{source}/{key}", next_step=REWRITE)


def read_whole_arrays(source: Place, manifest: Manifest) -> Iterator[WholeArray]:
    """Labels, sample keys and constants, array by array, each compared with its digest.

    In a cache of an earlier version only all arrays together have a digest. It is compared after the last one.

    Raises:
        FormatError: a missing or damaged array; names it.
    """
    arrays, layouts = WholeArrays(manifest), array_layouts(manifest)
    with ThreadPoolExecutor(WORKERS) as pool:
        for names in _batches(whole_arrays(manifest), layouts):
            found = pool.map(lambda name: _read_whole(source, layouts[name], name), names)
            for name, (files, values) in zip(names, found, strict=True):
                arrays.add(name, values)
                if mismatch := arrays.mismatch_of(name):
                    raise mismatch.as_error(source)
                yield WholeArray(name, files, arrays.found[name])
    arrays.check(source)


def damaged_metadata(place: Place, manifest: Manifest) -> dict[str, FormatError]:
    """Check every zarr.json, and labels, sample keys and constants.

    Returns:
        the error of each damaged array; under `zarr.json` that of the group, or of digests in it.

    Raises:
        StorageError: unreachable storage.
    """
    from cache_tools.store.create import metadata_files

    layouts, arrays, damaged = array_layouts(manifest), WholeArrays(manifest), dict[str, FormatError]()
    expected = metadata_files(manifest)
    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = {key: pool.submit(_read_metadata, place, key, expected[key]) for key in expected}
        for key, job in jobs.items():
            with _collect(damaged, key.removesuffix(f"/{GROUP}")):
                job.result()
        for names in _batches([name for name in whole_arrays(manifest) if name not in damaged], layouts):
            reads = {name: pool.submit(_read_whole, place, layouts[name], name) for name in names}
            for name, read in reads.items():
                with _collect(damaged, name):
                    arrays.add(name, read.result()[1])
    for mismatch in arrays.mismatches():
        for name in (GROUP,) if mismatch.sound else mismatch.arrays:
            damaged.setdefault(name, mismatch.as_error(place))
    return damaged


class SourceArray:
    """Decodes chunk files of one array at a place.

    Attributes:
        max_file_bytes: the most bytes that the file of a chunk can have.
    """

    def __init__(self, source: Place, name: str, layout: ArrayLayout) -> None:
        self.max_file_bytes = layout.max_file_bytes
        self._where, self._name, self._layout = f"{source}/{name}", name, layout
        self._metadata = read_file(source, f"{name}/{GROUP}", MAX_METADATA_BYTES)

    def decode(self, chunks: dict[str, bytes], selection: Any) -> npt.NDArray[Any]:
        """The selected elements, decoded from the files of the chunks that hold them.

        Raises:
            FormatError: damaged chunks, or metadata that differs from what the manifest says.
        """
        import zarr
        from zarr.core.buffer import default_buffer_prototype
        from zarr.storage import MemoryStore

        from cache_tools.store.bounded import check_array
        from cache_tools.store.group import ignore_numcodecs_warning, translate_errors

        ignore_numcodecs_warning()
        buffer = default_buffer_prototype().buffer
        files = {key: buffer.from_bytes(data) for key, data in chunks.items()}
        files[f"{self._name}/{GROUP}"] = buffer.from_bytes(self._metadata)
        with translate_errors(self._where):
            array = zarr.open_array(MemoryStore(files), path=self._name, mode="r", zarr_format=3)
            return np.asarray(check_array(array, self._layout, self._where)[selection])


def _read_whole(source: Place, layout: ArrayLayout, name: str) -> tuple[Files, npt.NDArray[Any]]:
    """A whole array: the files of its chunks, and its decoded values."""
    array = SourceArray(source, name, layout)
    keys = [f"{name}/{chunk}" for chunk in layout.chunk_names]
    try:
        files = {key: read_file(source, key, layout.max_file_bytes) for key in keys}
        values = array.decode(files, ...)
    except UnsafeFileError:
        raise
    except FormatError as error:
        found = FormatError(error.what, where=error.where, found=error.found, next_step=RESTORE_ARRAY)
        raise found from error
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise FormatError("a number is not finite", where=f"{source}/{name}", next_step=RESTORE_ARRAY)
    return files, values


def _read_metadata(source: Place, key: str, expected: dict[str, Any]) -> bytes:
    try:
        data = source.read(key, MAX_METADATA_BYTES)
    except FileNotFoundError as error:
        raise FormatError("missing metadata", where=f"{source}/{key}", next_step=REWRITE) from error
    check_metadata(source, key, data, expected)
    return data


@contextmanager
def _collect(damaged: dict[str, FormatError], name: str) -> Iterator[None]:
    try:
        yield
    except UnsafeFileError:  # only the user removes a link or a pipe
        raise
    except FormatError as error:
        damaged[name] = error


def _batches(names: Sequence[str], layouts: Layouts) -> Iterator[list[str]]:
    """Names of arrays that together are small enough to be in memory at the same time; large ones alone."""
    batch, size = list[str](), 0
    for name in names:
        layout = layouts[name]
        array_bytes = layout.chunk_bytes * len(layout.chunk_names)
        if batch and size + array_bytes > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += array_bytes
    if batch:
        yield batch
