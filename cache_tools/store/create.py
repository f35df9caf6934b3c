"""Create an empty cache: a zarr group with its arrays, labels, keys and constants, and the checks of these."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, MemoryStore

from cache_tools.errors import FormatError
from cache_tools.format import commits
from cache_tools.format.arrays import constant_shapes
from cache_tools.format.layout import ArrayLayout, Layouts, array_layouts, labels_array
from cache_tools.format.manifest import Manifest
from cache_tools.format.stored import MANIFEST_KEY, manifest_attribute
from cache_tools.store.group import RESTORE, ignore_numcodecs_warning, read_whole


def create_empty(
    path: Path,
    manifest: Manifest,
    labels: npt.NDArray[Any],
    sample_keys: npt.NDArray[Any],
    constants: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Create a cache at `path` with manifest, labels, keys and constants, and without any block."""
    arrays = _create_arrays(LocalStore(path), manifest)
    for name, values in {"labels": labels, "sample_keys": sample_keys, **constants}.items():
        arrays[name][...] = values


def metadata_files(manifest: Manifest) -> dict[str, Any]:
    """The contents of every zarr.json that `create_empty` writes, by file name."""
    files: dict[str, Buffer] = {}
    _create_arrays(MemoryStore(files), manifest)
    return {name: json.loads(content.to_bytes()) for name, content in files.items()}


def add_array(group: zarr.Group, name: str, layout: ArrayLayout) -> zarr.Array[Any]:
    return group.create_array(
        name,
        shape=layout.shape,
        chunks=layout.chunks,
        dimension_names=layout.dimensions,
        chunk_key_encoding={"name": "default", "separator": "."},  # all chunks in one folder: one flush covers them
        config={"write_empty_chunks": True},
        **layout.encoding,
    )


def check_samples(manifest: Manifest, labels: npt.NDArray[Any], sample_keys: npt.NDArray[Any]) -> None:
    """Raise FormatError unless labels and keys are those of the recipe's dataset."""
    samples = manifest.num_samples
    for name, array, shape, dtype in (
        ("labels", labels, *labels_array(manifest)),
        ("sample_keys", sample_keys, (samples, 16), "uint8"),
    ):
        if array.shape != shape or array.dtype.name != dtype:
            raise FormatError(f"wrong {name}", expected=f"{dtype} {list(shape)}", found=f"{array.dtype} {array.shape}")
    identity = manifest.recipe.dataset
    if commits.content_digest(sample_keys, labels, identity.class_names) != identity.content_digest:
        raise FormatError("labels and keys are not those of the dataset in the recipe", where=identity.name)


def check_constants(manifest: Manifest, constants: Mapping[str, npt.NDArray[Any]]) -> None:
    """Raise FormatError unless these are the constants of the recipe, by name, shape and dtype, and finite."""
    shapes = constant_shapes(manifest.recipe)
    if set(constants) != set(shapes):
        raise FormatError("wrong constants", expected=sorted(shapes), found=sorted(constants))
    for name, shape in shapes.items():
        array = constants[name]
        if array.shape != shape or array.dtype.name != "float32" or not np.isfinite(array).all():
            raise FormatError(
                f"wrong constant {name}",
                expected=f"finite float32 {list(shape)}",
                found=f"{array.dtype} {list(array.shape)}",
            )


def constants_digest(constants: Mapping[str, npt.NDArray[np.float32]]) -> str:
    """32 hex digits over names and numbers: `Manifest.constants_digest`."""
    return _digest((name, constants[name]) for name in sorted(constants))


class StoredConstants(Mapping[str, npt.NDArray[np.float32]]):
    """The constants of a cache by name, each read when it is asked for. Threads may read at the same time.

    The first read compares all constants with the digest in the manifest, since no commit covers them.

    Raises:
        FormatError: constants are missing, damaged or not those of the manifest.
    """

    def __init__(self, group: zarr.Group, path: Path, manifest: Manifest, layouts: Layouts) -> None:
        self._group, self._path, self._manifest, self._layouts = group, path, manifest, layouts
        self._names = tuple(sorted(constant_shapes(manifest.recipe)))
        self._is_checked, self._lock = False, threading.Lock()

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        if name not in self._names:
            raise KeyError(name)
        with self._lock:
            if not self._is_checked:
                self._check()
                self._is_checked = True
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _read(self, name: str) -> npt.NDArray[np.float32]:
        return read_whole(self._group, self._path, name, self._layouts)

    def _check(self) -> None:
        if _digest((name, self._read(name)) for name in self._names) != self._manifest.constants_digest:
            raise FormatError("heads, embeddings or steps are damaged", where=self._path, next_step=RESTORE)


def _create_arrays(store: Store, manifest: Manifest) -> dict[str, zarr.Array[Any]]:
    """Create the group and all its arrays, without any chunk."""
    group = zarr.create_group(store, attributes={MANIFEST_KEY: manifest_attribute(manifest)})
    ignore_numcodecs_warning()
    return {name: add_array(group, name, layout) for name, layout in array_layouts(manifest).items()}


def _digest(constants: Iterable[tuple[str, npt.NDArray[np.float32]]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, values in constants:
        digest.update(f"{name} {list(values.shape)} ".encode())
        digest.update(np.ascontiguousarray(values, dtype="<f4").data)
    return digest.hexdigest()
