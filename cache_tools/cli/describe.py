"""Describe a cache in text: the page of `cache-tools info`."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache_tools.config import Frozen
from cache_tools.console import print_line
from cache_tools.derive.lineage import Source, lineage
from cache_tools.errors import NotFoundError, printable
from cache_tools.format import commits
from cache_tools.format.arrays import constant_shapes, target_arrays
from cache_tools.format.layout import labels_array
from cache_tools.format.manifest import Manifest
from cache_tools.format.recipe import ClipIdentity, Imported, TeacherIdentity
from cache_tools.home import registry
from cache_tools.home.listing import RemoteRecord, commit_names, remote_record
from cache_tools.home.registry import CacheRecord, complete_views
from cache_tools.home.sizes import size_and_time
from cache_tools.lazy import np
from cache_tools.places import Place
from cache_tools.places.metadata import manifest_at
from cache_tools.refusion import describe_fusion
from cache_tools.store.group import read_manifest
from cache_tools.units import human_bytes
from cache_tools.views.recipe import ViewRecipe

_BESIDE_SAMPLES = {"left_out": "left out", "damaged": "damaged and left out"}  # of `FolderSummary.to_json`


class ArrayDetails(Frozen):
    """One array of a cache. `stored_bytes` is the size of its files, `dense_bytes` the decoded size when complete."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...] | None
    dense_bytes: int
    stored_bytes: int


class CacheDetails(Frozen):
    """Everything `cache-tools info` shows."""

    record: CacheRecord | RemoteRecord
    complete_views: tuple[int, ...]
    arrays: tuple[ArrayDetails, ...]
    manifest: Manifest


def describe(path: Path) -> CacheDetails:
    """Describe one cache without reading its arrays.

    Raises:
        NotFoundError, FormatError, StorageError: no cache there, or a damaged manifest.
    """
    manifest = read_manifest(path)
    return CacheDetails(
        record=registry.read_record(path),
        complete_views=tuple(registry.read_complete_views(path, manifest)),
        arrays=_arrays(manifest, lambda name: size_and_time(path / name)[0]),
        manifest=manifest,
    )


def describe_remote(place: Place) -> CacheDetails:
    """Describe a cache in an object store from its manifest and the list of its files; nothing is staged.

    Raises:
        NotFoundError, FormatError: no cache there, or a damaged manifest.
        StorageError: a store that does not answer.
    """
    manifest, entries = manifest_at(place), list(place.entries())
    record = remote_record(place, entries)
    if record is None:
        raise NotFoundError("the cache has just been removed", where=place)
    sizes = Counter[str]()
    for entry in entries:
        sizes[entry.key.partition("/")[0]] += entry.size
    return CacheDetails(
        record=record,
        complete_views=tuple(complete_views(commit_names(entry.key for entry in entries), manifest)),
        arrays=_arrays(manifest, lambda name: sizes[name]),
        manifest=manifest,
    )


def print_details(details: CacheDetails) -> None:
    """Print a page of `key: value` lines."""
    manifest, recipe, record = details.manifest, details.manifest.recipe, details.record
    dataset = recipe.dataset
    height, width = dataset.image_size
    _line("cache", str(record.path) if isinstance(record, CacheRecord) else record.url)
    if isinstance(record, CacheRecord) and record.origin is not None:
        _line("mirror of", record.origin)
    _line("name", manifest.name)
    _line("fingerprint", manifest.fingerprint)
    _line(
        "dataset",
        f"{record.dataset}, {dataset.num_samples:,} samples, {manifest.num_classes} classes, {height}×{width}",
    )
    _line("test split", ", ".join(manifest.dataset.test_splits) or "none: students are not evaluated")
    state = "complete" if record.complete else _unfinished(record, manifest)
    _line("views", f"{record.views_done} of {record.views_total} done, {state}")
    _line("view recipe", _views_recipe(recipe.views))
    if recipe.imported is not None:
        _line("teacher", recipe.teacher.architecture)
        _line("imported", _imported(recipe.imported))
    for number, teacher in enumerate(recipe.teachers if recipe.imported is None else ()):
        _line(_numbered("teacher", number), _network(teacher, len(recipe.teachers)))
    for number, clip in enumerate(recipe.clips):
        _line(_numbered("CLIP", number), _network(clip, len(recipe.clips)))
        _line(_numbered("prompts", number), f"{len(clip.templates)} templates, the first: {clip.templates[0]}")
    _line("fusion", describe_fusion(manifest))
    if recipe.has_features:
        _line("stored", f"{recipe.store}, {recipe.codecs}, teachers ran in {recipe.precision}")
    else:
        _line("stored", f"{recipe.store}, {recipe.codecs.logits.codec}")
    _line("blocks", f"{manifest.num_blocks} per view, {manifest.block_rows:,} rows each")
    _line(
        "size", f"{human_bytes(record.size_bytes)} {'on disk' if isinstance(record, CacheRecord) else 'in the store'}"
    )
    for array in details.arrays:
        stored, dense = human_bytes(array.stored_bytes), human_bytes(array.dense_bytes)
        _line(f"  {array.name}", f"{'×'.join(map(str, array.shape))} {array.dtype}, {stored} stored of {dense}")
    for source in _sources(manifest):
        _line("made from", str(source))
    for key, value in manifest.provenance.items():
        if key == "folders" and isinstance(value, dict):
            for split, content in value.items():
                _line(f"images of {split}", _folder(content))
        elif key != "source":
            _line(key, _flat(value))


def _unfinished(record: CacheRecord | RemoteRecord, manifest: Manifest) -> str:
    if isinstance(record, CacheRecord) and record.origin is not None:
        return "the others are staged when needed"
    if manifest.num_dropped:
        done = record.views_done + record.views_dropped >= record.views_total
        state = "all views were built" if done else f"run the same {manifest.recipe.made_by} command to continue"
        return f"{manifest.rolling} behind students that followed; {state}"
    return f"half-built: run the same {manifest.recipe.made_by} command to continue"


def _arrays(manifest: Manifest, stored_bytes: Callable[[str], int]) -> tuple[ArrayDetails, ...]:
    views, samples = manifest.num_views, manifest.num_samples
    specs = target_arrays(manifest.recipe, manifest.block_rows)
    listed: list[tuple[str, tuple[int, ...], str, tuple[int, ...] | None]] = [
        (spec.name, (views, samples, spec.width), spec.dtype, (1, spec.chunk_rows, spec.width)) for spec in specs
    ]
    columns = 1 + len(specs)
    listed.append((commits.COMMITS, (views, manifest.num_blocks, columns), "uint64", (1, 1, columns)))
    listed += [("labels", *labels_array(manifest), None), ("sample_keys", (samples, 16), "uint8", None)]
    listed += [(name, shape, "float32", None) for name, shape in constant_shapes(manifest.recipe).items()]
    return tuple(
        ArrayDetails(
            name=name,
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            dense_bytes=math.prod(shape) * np.dtype(dtype).itemsize,
            stored_bytes=stored_bytes(name),
        )
        for name, shape, dtype, chunks in listed
    )


def _sources(manifest: Manifest) -> tuple[Source, ...]:
    try:
        return lineage(manifest)
    except NotFoundError:  # a cache without a record of its source
        return ()


def _views_recipe(views: ViewRecipe) -> str:
    if views.made_by is not None:
        return f"views of {views.made_by.tool}, whose pixels cannot be made again: not for training"
    return f"version {views.version}, base seed {views.base_seed}, {_ops(views)}"


def _imported(imported: Imported) -> str:
    mean = "" if imported.averaged is None else f", the mean over {imported.averaged} views"
    return f"{imported.kind}, digest {imported.digest[:12]}{mean}"


def _ops(views: Any) -> str:
    steps = [op.op for op in views.ops]
    if views.mix is not None:
        alphas = {"MixUp": views.mix.mixup_alpha, "CutMix": views.mix.cutmix_alpha}
        steps.append(" or ".join(f"{name} (α {alpha:g})" for name, alpha in alphas.items() if alpha > 0.0))
    ops = " → ".join(steps) or "no ops"
    return f"{ops}, view 0 clean" if views.clean_first else ops


def _numbered(key: str, number: int) -> str:
    return key if number == 0 else f"{key} {number + 1}"


def _network(network: TeacherIdentity | ClipIdentity, of: int) -> str:
    share = f"share {network.weight:g}, " if of > 1 else ""
    if isinstance(network, TeacherIdentity) and network.outputs is not None:
        share += "outputs chosen by class, "
    return f"{network.architecture}, {share}weights {network.weights_digest[:12]}, {_preprocessing(network)}"


def _preprocessing(network: TeacherIdentity | ClipIdentity) -> str:
    size = network.preprocessing.size
    return f"{network.feature_dim} features, " + (f"input {size[0]}×{size[1]}" if size else "input as the canvas is")


def _folder(content: Any) -> str:
    """What a folder of images holds besides samples, in numbers; `--json` has every name."""
    if not isinstance(content, dict):
        return _flat(content)
    counts = {name: len(content[key]) for key, name in _BESIDE_SAMPLES.items() if isinstance(content.get(key), dict)}
    others = "".join(f", {count:,} {name}" for name, count in counts.items() if count)
    return f"{_flat(content.get('images'))} in {_flat(content.get('folder'))}{others}"


def _flat(value: Any) -> str:
    """A provenance value on one line; numbers from 0 to 1 as percentages."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items() if item not in (None, [], {}))
    if isinstance(value, float) and 0.0 <= value <= 1.0:
        return f"{value:.2%}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _line(key: str, value: str) -> None:
    print_line(f"{printable(key) + ':':<22} {value}")
