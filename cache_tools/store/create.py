"""An empty cache: its zarr group and arrays, with labels, keys and constants, and what these must be."""

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
from cache_tools.format.layout import ArrayLayout, Layouts, array_layouts
from cache_tools.format.manifest import Manifest
from cache_tools.format.stored import MANIFEST_KEY, manifest_attribute
from cache_tools.store.group import RESTORE, quiet_numcodecs, read_whole


def lay_out(
    path: Path,
    manifest: Manifest,
    labels: npt.NDArray[Any],
    sample_keys: npt.NDArray[Any],
    constants: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Make an empty cache at `path`: manifest, labels, keys and constants written, no block committed."""
    arrays = _empty(LocalStore(path), manifest)
    for name, values in {"labels": labels, "sample_keys": sample_keys, **constants}.items():
        arrays[name][...] = values


def metadata_files(manifest: Manifest) -> dict[str, Any]:
    """What `lay_out` would write as zarr.json of the group and of every array: contents by file name."""
    files: dict[str, Buffer] = {}
    _empty(MemoryStore(files), manifest)
    return {name: json.loads(content.to_bytes()) for name, content in files.items()}


def _empty(store: Store, manifest: Manifest) -> dict[str, zarr.Array[Any]]:
    """A group with every array and no chunk."""
    group = zarr.create_group(store, attributes={MANIFEST_KEY: manifest_attribute(manifest)})
    quiet_numcodecs()
    return {name: add_array(group, name, layout) for name, layout in array_layouts(manifest).items()}


def add_array(group: zarr.Group, name: str, layout: ArrayLayout) -> zarr.Array[Any]:
    """One array, empty."""
    return group.create_array(
        name,
        shape=layout.shape,
        chunks=layout.chunks,
        dimension_names=layout.dimensions,
        chunk_key_encoding={"name": "default", "separator": "."},  # one folder per array: one flush covers a name
        config={"write_empty_chunks": True},
        **layout.encoding,
    )


def check_samples(manifest: Manifest, labels: npt.NDArray[Any], sample_keys: npt.NDArray[Any]) -> None:
    samples = manifest.num_samples
    for name, array, shape, dtype in (
        ("labels", labels, (samples,), "int64"),
        ("sample_keys", sample_keys, (samples, 16), "uint8"),
    ):
        if array.shape != shape or array.dtype.name != dtype:
            raise FormatError(f"wrong {name}", expected=f"{dtype} {list(shape)}", found=f"{array.dtype} {array.shape}")
    identity = manifest.recipe.dataset
    if commits.content_digest(sample_keys, labels, identity.class_names) != identity.content_digest:
        raise FormatError("labels and keys are not those of the dataset in the recipe", where=identity.name)


def constants_digest(constants: Mapping[str, npt.NDArray[np.float32]]) -> str:
    """32 hex digits over names and numbers: `Manifest.constants_digest`."""
    return _digest((name, constants[name]) for name in sorted(constants))


def _digest(constants: Iterable[tuple[str, npt.NDArray[np.float32]]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, values in constants:
        digest.update(f"{name} {list(values.shape)} ".encode())
        digest.update(np.ascontiguousarray(values, dtype="<f4").data)
    return digest.hexdigest()


class StoredConstants(Mapping[str, npt.NDArray[np.float32]]):
    """The arrays of a cache that hold for all samples and views, by name, each read when it is asked for.

    The first read compares them all with the manifest's digest: no commit covers them. Threads may read at once.

    Raises:
        FormatError: missing or damaged ones, or others than the manifest was written for.
    """

    def __init__(self, group: zarr.Group, path: Path, manifest: Manifest, layouts: Layouts) -> None:
        self._group, self._path, self._manifest, self._layouts = group, path, manifest, layouts
        self._names = tuple(sorted(constant_shapes(manifest.recipe)))
        self._checked, self._checking = False, threading.Lock()

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        if name not in self._names:
            raise KeyError(name)
        with self._checking:
            if not self._checked:
                self._check()
                self._checked = True
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
            raise FormatError(
                "heads, embeddings or steps are damaged",
                where=self._path,
                next_step=RESTORE,
            )


def check_constants(manifest: Manifest, constants: Mapping[str, npt.NDArray[Any]]) -> None:
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
