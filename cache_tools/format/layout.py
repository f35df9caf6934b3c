"""How each array of a cache is stored: shape, dtype, chunks, codecs and dimensions follow from the manifest."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from cache_tools.codecs.features import STEPS
from cache_tools.codecs.product import BASIS, CODEBOOKS, MEAN
from cache_tools.format import commits
from cache_tools.format.arrays import CHUNK_BYTES, SEEDS, ArraySpec, TargetSpec, constant_shapes, seed_arrays, targets
from cache_tools.format.manifest import Manifest
from cache_tools.lazy import np

_DIMENSIONS = {
    "labels": ("sample", "class"),
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
    SEEDS: ("view", "sample", "seed"),
}
# Their length differs between networks, so their name must too: some tools align arrays by dimension name.
_OF_A_NETWORK = {"teacher_feature", "clip_feature", "prompt"}
# Of the constants of `product`; the last axis of the first two is that of the target.
_OF_CODEBOOKS = {MEAN: (), BASIS: ("component",), CODEBOOKS: ("part", "entry", "part_component")}


class ArrayLayout(NamedTuple):
    """How one array is stored.

    Attributes:
        dimensions: names of its axes.
        encoding: arguments of zarr's `create_array`: `dtype`, `serializer`, `compressors`, `fill_value` and, for some
            arrays, `attributes`.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dimensions: tuple[str, ...]
    encoding: dict[str, Any]

    @property
    def dtype(self) -> str:
        return str(self.encoding["dtype"])

    @property
    def codecs(self) -> list[str]:
        """Names of the codecs of a chunk, in the order of writing."""
        return [codec["name"] for codec in (self.encoding["serializer"], *self.encoding["compressors"])]

    @property
    def fill_value(self) -> np.generic:
        scalar: type[np.generic] = np.dtype(self.dtype).type
        return scalar(self.encoding["fill_value"])

    @property
    def endian(self) -> str | None:
        """Byte order of plain numbers; None for single bytes and for codecs that pack numbers themselves."""
        endian: str | None = self.encoding["serializer"].get("configuration", {}).get("endian")
        return endian

    @property
    def has_views(self) -> bool:
        """Whether its first axis grows with the number of views."""
        return self.dimensions[0] == "view"

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a decoded chunk."""
        return math.prod(self.chunks) * np.dtype(self.dtype).itemsize

    @property
    def chunk_names(self) -> list[str]:
        """File names of all chunks; every file exists once the array is filled."""
        counts = (-(-length // chunk) for length, chunk in zip(self.shape, self.chunks, strict=True))
        return [".".join(("c", *map(str, index))) for index in np.ndindex(*counts)]

    @property
    def max_file_bytes(self) -> int:
        """The most bytes that the file of a chunk can have: codecs add little to data that does not compress."""
        return self.chunk_bytes + self.chunk_bytes // 8 + (1 << 16)


Layouts = Mapping[str, ArrayLayout]


def array_layouts(manifest: Manifest) -> dict[str, ArrayLayout]:
    """Layouts of all arrays of a cache, by name: labels, keys and constants first, then targets, then commits."""
    samples = manifest.num_samples
    shapes = {"labels": labels_array(manifest), "sample_keys": ((samples, 16), "uint8")}
    shapes |= {name: (shape, "float32") for name, shape in constant_shapes(manifest.recipe).items()}
    layouts = {
        name: ArrayLayout(shape, _chunk_shape(shape, dtype), _dimensions(name)[: len(shape)], _plain(name, dtype))
        for name, (shape, dtype) in shapes.items()
    }
    for target in targets(manifest.recipe, manifest.block_rows):
        layouts |= {spec.name: target_layout(target, spec, (manifest.num_views, samples)) for spec in target.arrays}
    for spec in seed_arrays(manifest.recipe, manifest.block_rows):
        shape = (manifest.num_views, samples, spec.width)
        encoding = spec.stored.create_arguments()
        layouts[spec.name] = ArrayLayout(shape, (1, spec.chunk_rows, spec.width), _dimensions(spec.name), encoding)
    columns = commits.columns(manifest.recipe, manifest.block_rows)
    shape = (manifest.num_views, manifest.num_blocks, len(columns))
    encoding = _plain(commits.COMMITS, "uint64") | {
        "compressors": [{"name": "crc32c"}],
        "attributes": {"columns": columns},
    }
    layouts[commits.COMMITS] = ArrayLayout(shape, (1, 1, len(columns)), _dimensions(commits.COMMITS), encoding)
    return layouts


def labels_array(manifest: Manifest) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of the labels: a class per sample or, for samples with any number, 0 and 1 for each class."""
    if manifest.recipe.dataset.multi_label:
        return (manifest.num_samples, manifest.num_classes), "uint8"
    return (manifest.num_samples,), "int64"


def target_layout(target: TargetSpec, spec: ArraySpec, shape: tuple[int, int]) -> ArrayLayout:
    """Layout of one stored array of a target; `shape` is (views, samples)."""
    axes = _dimensions(target.name)
    if spec.width != target.width:  # columns of codes, not classes or features
        axes = (*axes[:-1], f"{spec.name}_column")
    chunks = (1, spec.chunk_rows, spec.width)
    return ArrayLayout((*shape, spec.width), chunks, axes, spec.stored.create_arguments())


def _plain(name: str, dtype: str) -> dict[str, Any]:
    """The encoding of labels, keys, constants and commits. Fill values cannot be data: NaN, for labels −1 or 255."""
    missing = -1 if dtype == "int64" else 255
    fill = float("nan") if dtype.startswith("float") else missing if name == "labels" else 0
    endian = {} if np.dtype(dtype).itemsize == 1 else {"configuration": {"endian": "little"}}
    zstd = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
    return {
        "dtype": dtype,
        "serializer": {"name": "bytes", **endian},
        "compressors": [zstd, {"name": "crc32c"}],
        "fill_value": fill,
    }


def _dimensions(name: str) -> tuple[str, ...]:
    """Dimension names. The axis of `clip_features_2` is `clip_feature_2`; axes that networks share keep one name."""
    if name.endswith(STEPS):
        return _dimensions(name.removesuffix(STEPS))[-1:]
    for suffix, own in _OF_CODEBOOKS.items():
        if name.endswith(suffix):
            return (*own, *(_dimensions(name.removesuffix(suffix))[-1:] if suffix != CODEBOOKS else ()))
    plain, suffix = re.fullmatch(r"(.+?)((?:_\d+)?)", name).groups()  # type: ignore[union-attr]
    return tuple(axis + suffix if axis in _OF_A_NETWORK else axis for axis in _DIMENSIONS[plain])


def _chunk_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    row_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
    return (min(max(1, CHUNK_BYTES // max(1, row_bytes)), shape[0]), *shape[1:])
