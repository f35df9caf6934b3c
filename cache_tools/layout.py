"""The arrays of an empty cache: their names, shapes, chunks, codecs and dimensions. docs/format.md in code."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from cache_tools import commits
from cache_tools.arrays import CHUNK_BYTES, ArraySpec, TargetSpec, constant_shapes, targets
from cache_tools.codec_features import STEPS
from cache_tools.errors import FormatError
from cache_tools.format import MANIFEST_KEY, Manifest, manifest_attribute
from cache_tools.store import quiet_numcodecs

_DIMENSIONS = {
    "labels": ("sample",),
    "sample_keys": ("sample", "byte"),
    "commits": ("view", "block", "column"),
    "fused_logits": ("view", "sample", "class"),
    "fused_features": ("view", "sample", "feature"),
    "teacher_logits": ("view", "sample", "class"),
    "teacher_features": ("view", "sample", "teacher_feature"),
    "clip_features": ("view", "sample", "clip_feature"),
    "teacher_projection": ("teacher_feature", "feature"),
    "clip_projection": ("clip_feature", "feature"),
    "class_embeddings": ("class", "clip_feature"),
    "text_features": ("prompt", "class", "clip_feature"),
    "teacher_head_weight": ("class", "teacher_feature"),
    "teacher_head_bias": ("class",),
}
# Of another length for every network, so each has its own: tools that align arrays by dimension rely on that.
_OF_A_NETWORK = {"teacher_feature", "clip_feature", "prompt"}


def lay_out(
    path: Path,
    manifest: Manifest,
    labels: npt.NDArray[Any],
    sample_keys: npt.NDArray[Any],
    constants: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Make an empty cache at `path`: manifest, labels, keys and constants written, no block committed."""
    group = zarr.create_group(LocalStore(path), attributes={MANIFEST_KEY: manifest_attribute(manifest)})
    quiet_numcodecs()
    for name, values in {"labels": labels, "sample_keys": sample_keys, **constants}.items():
        _add(group, name, values.shape, _chunk_shape(values), _dimensions(name), _plain(name, values.dtype))[...] = (
            values
        )
    shape = (manifest.num_views, manifest.num_samples)
    for target in targets(manifest.recipe, manifest.block_rows):
        for spec in target.arrays:
            add_target_array(group, target, spec, shape)
    columns = commits.columns(manifest.recipe, manifest.block_rows)
    width = len(columns)
    table = {
        **_plain(commits.COMMITS, np.dtype("uint64")),
        "compressors": [{"name": "crc32c"}],
        "attributes": {"columns": columns},
    }
    _add(
        group,
        commits.COMMITS,
        (manifest.num_views, manifest.num_blocks, width),
        (1, 1, width),
        _dimensions(commits.COMMITS),
        table,
    )


def add_target_array(group: zarr.Group, target: TargetSpec, spec: ArraySpec, shape: tuple[int, int]) -> zarr.Array[Any]:
    """One stored array of a target, empty, for `shape` = (views, samples)."""
    axes = _dimensions(target.name)
    if spec.width != target.width:  # numbers per row, or fewer than there are classes
        axes = (*axes[:-1], f"{spec.name}_column")
    chunks = (1, spec.chunk_rows, spec.width)
    return _add(group, spec.name, (*shape, spec.width), chunks, axes, spec.stored.create_arguments())


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
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(constants):
        digest.update(f"{name} {list(constants[name].shape)} ".encode())
        digest.update(np.ascontiguousarray(constants[name], dtype="<f4").data)
    return digest.hexdigest()


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


def _add(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dimensions: tuple[str, ...],
    arguments: dict[str, Any],
) -> zarr.Array[Any]:
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dimension_names=dimensions,
        chunk_key_encoding={"name": "default", "separator": "."},  # one folder per array: one flush covers a name
        config={"write_empty_chunks": True},
        **arguments,
    )


def _plain(name: str, dtype: np.dtype[Any]) -> dict[str, Any]:
    """How whole numbers and constants are stored. What is absent cannot be taken for data: NaN, −1 for labels."""
    fill = float("nan") if dtype.kind == "f" else -1 if name == "labels" else 0
    endian = {} if dtype.itemsize == 1 else {"configuration": {"endian": "little"}}
    zstd = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
    return {
        "dtype": dtype.name,
        "serializer": {"name": "bytes", **endian},
        "compressors": [zstd, {"name": "crc32c"}],
        "fill_value": fill,
    }


def _dimensions(name: str) -> tuple[str, ...]:
    """`clip_features_2` is along `clip_feature_2`; what all networks share keeps its name."""
    if name.endswith(STEPS):
        return _dimensions(name.removesuffix(STEPS))[-1:]
    plain, suffix = re.fullmatch(r"(.+?)((?:_\d+)?)", name).groups()  # type: ignore[union-attr]
    return tuple(axis + suffix if axis in _OF_A_NETWORK else axis for axis in _DIMENSIONS[plain])


def _chunk_shape(values: npt.NDArray[Any]) -> tuple[int, ...]:
    rows = max(1, CHUNK_BYTES // max(1, values.nbytes // len(values)))
    return (min(rows, len(values)), *values.shape[1:])
