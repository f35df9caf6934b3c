"""Open the zarr group of a cache in a local folder: manifest, arrays, and their errors as CacheErrors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_tools.console import storage_error
from cache_tools.errors import CacheError, FormatError, NotFoundError
from cache_tools.files import MAX_METADATA_BYTES, SafeFolder
from cache_tools.format import commits
from cache_tools.format.arrays import ArraySpec
from cache_tools.format.digests import RESTORE_ARRAY
from cache_tools.format.layout import Layouts
from cache_tools.format.manifest import Manifest
from cache_tools.format.stored import parse_group
from cache_tools.lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt
    import zarr

RESTORE = "restore it from a copy, or remove the cache and build it again"


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the cache at `path` from its zarr.json, without importing zarr.

    Raises:
        NotFoundError: nothing is there.
        FormatError: not a cache, or a damaged or unknown manifest.
        StorageError: the file cannot be read.
    """
    file = path / "zarr.json"
    try:
        group = json.loads(SafeFolder(path).read_bytes(file.name, MAX_METADATA_BYTES))
        attributes = group["attributes"]
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.exists():
            raise NotFoundError("no cache here", where=path) from error
        raise FormatError("not a teacher cache", where=path, expected="a folder with zarr.json") from error
    except OSError as error:
        raise storage_error(error) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(
            "damaged or foreign zarr.json", where=file, expected="a zarr v3 group with attributes"
        ) from error
    if group.get("node_type") != "group" or group.get("zarr_format") != 3:
        raise FormatError("not a teacher cache", where=path, expected="a zarr v3 group")
    return parse_group(attributes, where=str(path))


def open_group(path: Path, layouts: Layouts, *, writable: bool = False) -> zarr.Group:
    """Open the zarr group of the cache at `path`. A writable group flushes every write to the disk."""
    import zarr

    from cache_tools.store.local import DurableStore, ReadStore

    ignore_numcodecs_warning()
    limits = {name: layout.max_file_bytes for name, layout in layouts.items()}
    store = (DurableStore if writable else ReadStore)(path, read_only=not writable, limits=limits)
    with translate_errors(path):
        return zarr.open_group(store, mode="r+" if writable else "r", zarr_format=3, use_consolidated=False)


def open_array(group: zarr.Group, path: Path, name: str, layouts: Layouts) -> zarr.Array[Any]:
    """Open one array of a cache and check it against its layout.

    Raises:
        FormatError: the array is missing or stored differently (`bounded.check_array`).
    """
    from cache_tools.store.bounded import check_array

    where = path / name
    with translate_errors(where):
        try:
            array = group[name]
        except KeyError as error:
            raise FormatError("missing array", where=where, next_step=RESTORE) from error
        return check_array(array, layouts[name], where)


def read_whole(group: zarr.Group, path: Path, name: str, layouts: Layouts) -> npt.NDArray[Any]:
    """Read a whole array: labels, sample keys or a constant.

    Raises:
        FormatError: the array is missing, damaged or stored differently, or a number is not finite.
    """
    array, folder = open_array(group, path, name, layouts), SafeFolder(path).below(name)
    for chunk in layouts[name].chunk_names:
        if not folder.exists(chunk):  # before memory is allocated for all chunks
            raise FormatError("a chunk is missing", where=path / name, next_step=RESTORE_ARRAY)
    with translate_errors(path / name, RESTORE_ARRAY):
        values = np.asarray(array[...])
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise FormatError("a number is not finite", where=path / name, next_step=RESTORE_ARRAY)
    return values


def ignore_numcodecs_warning() -> None:
    """Silence zarr's warning that pcodec is not in its specification: our documentation of the codec says so."""
    warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3 specification")


def check_chunks(spec: ArraySpec, manifest: Manifest, path: Path, view: int, start: int, stop: int) -> None:
    """Raise FormatError unless the chunk files of samples `start` to `stop` exist; before memory is allocated."""
    folder = SafeFolder(path).below(spec.name)
    for chunk in range(start // spec.chunk_rows, -(-stop // spec.chunk_rows)):
        if not folder.exists(f"c.{view}.{chunk}.0"):
            raise damaged_block_error("a chunk is missing", path, spec, manifest, view, chunk * spec.chunk_rows)


def damaged_block_error(
    what: str, path: Path, spec: ArraySpec, manifest: Manifest, view: int, row: int, found: object = None
) -> FormatError:
    """An error that names the block of sample `row` and how to compute it again."""
    block = row // manifest.block_rows
    commit = path / commits.BlockId(view, block).commit_key
    return FormatError(
        what,
        where=f"{path / spec.name}, view {view}, block {block}",
        found=found,
        next_step=f"remove {commit} and run the same {manifest.recipe.made_by} command: it computes the block again",
    )


@contextmanager
def translate_errors(where: object, next_step: str = RESTORE) -> Iterator[None]:
    """Turn any error of zarr, its codecs or the operating system into a CacheError.

    Args:
        next_step: what the message advises for damaged bytes.
    """
    try:
        yield
    except CacheError:
        raise
    except FileNotFoundError as error:
        raise FormatError("missing file", where=error.filename or where) from error
    except OSError as error:
        if error.filename is None:
            error.filename = str(where)
        raise storage_error(error) from error
    except Exception as error:  # damaged bytes can cause any error: ValueError, KeyError, RuntimeError of a codec, …
        raise FormatError(
            "damaged or unreadable",
            where=where,
            found=f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else 'no details'}",
            next_step=next_step,
        ) from error
