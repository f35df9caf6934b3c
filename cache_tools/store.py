"""Storage of a cache: the manifest, the zarr arrays on a local path, and storage or format trouble in our words."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cache_tools import commits
from cache_tools.console import storage_error
from cache_tools.errors import CacheError, FormatError, NotFoundError
from cache_tools.format import MANIFEST_KEY, Manifest, parse_manifest

if TYPE_CHECKING:
    import zarr

RESTORE = "restore it from a copy, or remove the cache and build it again"


def read_manifest(path: Path) -> Manifest:
    """The manifest of the cache at `path`, from its zarr.json alone (no zarr import).

    Raises:
        NotFoundError: nothing there.
        FormatError: not a cache, or a damaged or unknown manifest.
        StorageError: not readable.
    """
    file = path / "zarr.json"
    try:
        group = json.loads(file.read_bytes())
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
    if not isinstance(attributes, dict) or group.get("node_type") != "group" or group.get("zarr_format") != 3:
        raise FormatError("not a teacher cache", where=path, expected="a zarr v3 group")
    return parse_manifest(attributes.get(MANIFEST_KEY), where=str(path))


def open_group(path: Path, *, writable: bool = False) -> zarr.Group:
    """The zarr group of the cache at `path`; a writable one flushes every write to the disk."""
    import zarr
    from zarr.storage import LocalStore

    quiet_numcodecs()
    with translated(path):
        if not writable:
            return zarr.open_group(LocalStore(path, read_only=True), mode="r", zarr_format=3, use_consolidated=False)
        from cache_tools.durable_store import DurableStore

        return zarr.open_group(DurableStore(path), mode="r+", zarr_format=3, use_consolidated=False)


def open_array(
    group: zarr.Group, path: Path, name: str, shape: tuple[int, ...], dtype: str, *, more_views: bool = False
) -> zarr.Array[Any]:
    """One array of a cache, checked against what the manifest promises.

    Args:
        more_views: axis 0 may be longer: growing a cache resizes its arrays before it changes the manifest.

    Raises:
        FormatError: missing, or another shape or dtype.
    """
    import zarr

    where = path / name
    with translated(where):
        if name not in group:
            raise FormatError("missing array", where=where, next_step=RESTORE)
        array = group[name]
    if not isinstance(array, zarr.Array):
        raise FormatError("wrong array", where=where, expected="a zarr array", found="a group")
    fits = array.shape == shape or (more_views and array.shape[1:] == shape[1:] and array.shape[0] >= shape[0])
    if not fits or array.dtype.name != dtype:
        raise FormatError(
            "wrong array",
            where=where,
            expected=f"{dtype} {list(shape)}",
            found=f"{array.dtype} {list(array.shape)}",
        )
    return array


def read_constant(group: zarr.Group, path: Path, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """An array that holds for all samples and views, float32.

    Raises:
        FormatError: missing, damaged, or another shape.
    """
    array = open_array(group, path, name, shape, "float32")
    with translated(path / name):
        values = np.asarray(array[...])
    if np.isnan(values).any():
        raise FormatError("a chunk is missing", where=path / name, next_step=RESTORE)
    return values


def quiet_numcodecs() -> None:
    """No warning that a codec is not in the zarr specification: who chose pcodec was told, who reads cannot help it."""
    warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3 specification")


def read_commits(table: zarr.Array[Any], path: Path, manifest: Manifest) -> npt.NDArray[np.uint64]:
    """All of `commits` that the manifest promises, uint64 [V, blocks, columns]; 0 where nothing is committed.

    Raises:
        FormatError: a damaged commit; names the file.
    """
    folder = path / commits.COMMITS
    try:
        with translated(folder):
            return np.asarray(table[: manifest.num_views])
    except FormatError as error:
        for view, block in np.ndindex(manifest.num_views, manifest.num_blocks):
            try:
                table[view, block]
            except Exception as cause:
                raise FormatError(
                    "damaged commit",
                    where=folder / commits.file_name(view, block),
                    next_step="remove this file: the same build-cache command then computes the block again",
                ) from cause
        raise error


@contextmanager
def translated(where: object) -> Iterator[None]:
    """Turn whatever zarr, its codecs and the operating system raise on reading or writing into a CacheError."""
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
    except Exception as error:  # damaged bytes surface as anything: ValueError, KeyError, RuntimeError of a codec, …
        raise FormatError(
            "damaged or unreadable",
            where=where,
            found=f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else 'no details'}",
            next_step=RESTORE,
        ) from error
