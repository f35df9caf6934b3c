"""Read labels, sample keys and constants of a local cache, compared with their digests."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_tools.format.arrays import constant_shapes
from cache_tools.format.commits import content_digest
from cache_tools.format.digests import SAMPLE_ARRAYS, Mismatch, WholeArrays, check_array, whole_arrays
from cache_tools.format.layout import Layouts
from cache_tools.format.manifest import Manifest
from cache_tools.store.group import read_whole

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import zarr


def check_whole_arrays(group: zarr.Group, path: Path, manifest: Manifest, layouts: Layouts) -> dict[str, str]:
    """Read labels, sample keys and constants, and compare them with their digests.

    Returns:
        the digest of each array.

    Raises:
        FormatError: one of them is missing or damaged; names it.
    """
    arrays = WholeArrays(manifest)
    for name in whole_arrays(manifest):
        arrays.add(name, read_whole(group, path, name, layouts))
        if mismatch := arrays.mismatch_of(name):
            raise mismatch.as_error(path)
    arrays.check(path)
    return arrays.found


def read_samples(
    group: zarr.Group, path: Path, manifest: Manifest, layouts: Layouts
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Labels and sample keys.

    Raises:
        FormatError: they are missing, damaged or not those of the recipe.
    """
    keys, labels = (_read(group, path, name, manifest, layouts) for name in SAMPLE_ARRAYS)
    identity = manifest.recipe.dataset
    found = content_digest(keys, labels, identity.class_names)
    if found != identity.content_digest:
        raise Mismatch(SAMPLE_ARRAYS, identity.content_digest, found).as_error(path)
    return labels, keys


class StoredConstants(Mapping[str, "npt.NDArray[np.float32]"]):
    """The constants of a cache by name, each read when it is asked for. Threads may read at the same time.

    Each array is compared with its digest. In a cache of an earlier version, the first read compares all of them with
    the one digest in the manifest.

    Raises:
        FormatError: constants are missing, damaged or not those of the manifest.
    """

    def __init__(self, group: zarr.Group, path: Path, manifest: Manifest, layouts: Layouts) -> None:
        self._group, self._path, self._manifest, self._layouts = group, path, manifest, layouts
        self._names = tuple(sorted(constant_shapes(manifest.recipe)))
        self._is_checked, self._lock = bool(manifest.array_digests), threading.Lock()

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        if name not in self._names:
            raise KeyError(name)
        with self._lock:
            if not self._is_checked:
                self._check()
                self._is_checked = True
        return _read(self._group, self._path, name, self._manifest, self._layouts)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _check(self) -> None:
        arrays = WholeArrays(self._manifest)
        for name in self._names:
            arrays.add(name, read_whole(self._group, self._path, name, self._layouts))
        arrays.check(self._path)


def _read(group: zarr.Group, path: Path, name: str, manifest: Manifest, layouts: Layouts) -> npt.NDArray[Any]:
    values = read_whole(group, path, name, layouts)
    check_array(manifest, name, values, path)
    return values
