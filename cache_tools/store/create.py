"""Create an empty cache: a zarr group with its arrays, labels, keys and constants, and the checks of these."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
from cache_tools.format.layout import ArrayLayout, array_layouts, labels_array
from cache_tools.format.manifest import Manifest
from cache_tools.format.stored import group_attributes
from cache_tools.store.group import ignore_numcodecs_warning

UNREADABLE = "metadata that cannot be read"


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


def metadata_difference(name: str, data: bytes, expected: dict[str, Any]) -> str | None:
    """The first thing wrong with the bytes of a zarr.json; None if there is nothing.

    Array metadata follow from the manifest, so they need no digest. The manifest has one.

    Args:
        name: of the file.
        expected: its contents, from `metadata_files`.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return UNREADABLE
    if not isinstance(found, dict):
        return UNREADABLE
    if name == "zarr.json":
        found, expected = ({**each, "attributes": _names(each.get("attributes"))} for each in (found, expected))
    elif _has_more_views(found, expected):  # a build is growing the cache and has not written its manifest yet
        found = found | {"shape": expected["shape"]}
    if found == expected:
        return None
    keys = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    return f"metadata differs from what the manifest requires: {', '.join(keys)}"


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


def _names(attributes: Any) -> Any:
    return sorted(attributes) if isinstance(attributes, dict) else attributes


def _has_more_views(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether an array has the expected shape but for more views."""
    if not isinstance(found.get("shape"), list) or not found["shape"]:
        return False
    first, wanted = found["shape"][0], expected["shape"]
    return found["shape"][1:] == wanted[1:] and isinstance(first, int) and first > wanted[0]


def _create_arrays(store: Store, manifest: Manifest) -> dict[str, zarr.Array[Any]]:
    """Create the group and all its arrays, without any chunk."""
    group = zarr.create_group(store, attributes=group_attributes(manifest))
    ignore_numcodecs_warning()
    return {name: add_array(group, name, layout) for name, layout in array_layouts(manifest).items()}
