"""A cache as a Hugging Face data set: parquet files with a card, which `datasets.load_dataset(FOLDER)` opens.

A row is what the teachers said of one view of one image. Blocks are read, checked and written one after the other.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_tools.alignment import aligned, open_cached
from cache_tools.codecs import Float16, SparseCodec
from cache_tools.config import Frozen, dump_yaml
from cache_tools.console import Progress, storage_error
from cache_tools.errors import DataError, NotFoundError, StorageError, printable
from cache_tools.files import PARTIAL, remove_leftover, remove_leftovers, sync_folder, sync_tree
from cache_tools.format.arrays import seed_arrays
from cache_tools.images import whole_split
from cache_tools.images.encoded import EncodedImages
from cache_tools.images.recipe import as_received
from cache_tools.reader import TeacherCache
from cache_tools.refusion import describe_fusion

if TYPE_CHECKING:
    import pyarrow as pa

    from cache_tools.targets import ViewTargets

MARKER = "teacher_cache_export.json"
SHARD_BYTES = 500_000_000
_SPLIT = re.compile(r"\w+(\.\w+)*", re.ASCII)


class HfExport(Frozen):
    """The result of an export. `bytes` are those of the parquet files."""

    path: Path
    split: str
    rows: int
    shards: int
    bytes: int
    columns: tuple[str, ...]


def export_hf(
    cache: TeacherCache,
    out: Path,
    *,
    views: list[int] | None = None,
    top: int | None = None,
    features: bool = False,
    file_names: bool = False,
    data_dir: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> HfExport:
    """Write a cache as a Hugging Face data set.

    Args:
        views: None for all complete views.
        top: store the so many most probable classes instead of all logits.
        features: also the fused features.
        file_names: also the file of each image, which opens the data set of the cache.
        data_dir: where its files are, if they were moved.
        shard_bytes: of the numbers in a parquet file, before compression.
        overwrite: replace an earlier export.

    Raises:
        NotFoundError: no such view, no features, or no complete view.
        DataError: no pyarrow, or images without files.
        FormatError: a damaged block.
        StorageError: something else is at `out`, or the disk is full or read-only.
    """
    _require_pyarrow(out)
    chosen = list(cache.complete_views) if views is None else list(dict.fromkeys(views))
    if not chosen:
        raise NotFoundError("no view is complete", where=cache.path, next_step="run the command that builds it again")
    for view in chosen:
        cache.require_view(view)
    if features and not cache.recipe.has_features:
        raise NotFoundError("this cache has no features", where=cache.path, next_step="leave --features out")
    if top is not None and not 0 < top < cache.num_classes:
        raise DataError("bad --top", expected=f"1 to {cache.num_classes - 1}", found=top)
    cache.check_arrays()
    names = _file_names(cache, data_dir) if file_names else None
    rows = _Rows(cache, top=top, features=features, names=names)
    _check_free(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            shards, size = _write_shards(rows, temporary / "data", chosen, shard_bytes)
            split = _split_name(cache)
            (temporary / "README.md").write_text(_card(cache, rows, chosen, split), encoding="utf-8")
            marker = {"fingerprint": cache.manifest.fingerprint, "views": chosen, "format": 1}
            (temporary / MARKER).write_text(json.dumps(marker, indent=2), encoding="utf-8")
            sync_tree(temporary)
            _put_in_place(temporary, out)
        finally:
            with suppress(OSError):
                remove_leftover(temporary)
    except OSError as error:
        raise storage_error(error) from error
    return HfExport(
        path=out,
        split=split,
        rows=len(chosen) * cache.num_samples,
        shards=shards,
        bytes=size,
        columns=tuple(rows.features),
    )


class _Rows:
    """The rows of a cache as tables.

    Attributes:
        features: column → the feature that the package `datasets` knows it by.
        about: column → what it has, for the card.
    """

    def __init__(self, cache: TeacherCache, *, top: int | None, features: bool, names: list[str] | None) -> None:
        self._cache, self._top, self._names = cache, top, names
        spec = cache.targets.get("fused_logits")
        codec = None if spec is None else spec.codec
        self._sparse = codec if isinstance(codec, SparseCodec) else None
        self._dtype = "float16" if isinstance(codec, Float16) else "float32"
        self._with_features, self._has_seeds = features, bool(seed_arrays(cache.recipe, 1))
        self.features: dict[str, Any] = {}
        self.about: dict[str, str] = {}
        self._declare()

    def _declare(self) -> None:
        cache, multi_label = self._cache, self._cache.recipe.dataset.multi_label
        label = {"names": list(cache.class_names), "_type": "ClassLabel"}
        self._add("view", _value("int32"), "the augmentation seed: the number of the view")
        self._add("sample", _value("int64"), "the number of the image")
        self._add("key", _value("string"), "its content key: 32 hex digits of blake2b over the bytes of its file")
        if self._names is not None:
            self._add("file_name", _value("string"), "its file, below the folder of the split")
        if multi_label:
            self._add("labels", _list(label), "the ground truth: every class that is in the image")
        else:
            self._add("label", label, "the ground truth")
        if self._has_seeds:
            self._add("tool_seed", _value("int32"), "the seed from which the other tool drew the view")
        if self._sparse is not None or self._top is not None:
            temperature = 1.0 if self._sparse is None or self._top is not None else self._sparse.temperature
            self._add("classes", _list(_value("int32")), "the classes whose probabilities are known")
            self._add(
                "probabilities",
                _list(_value("float32")),
                f"what the teachers give them, at temperature {temperature:g}",
            )
            self._add("rest", _value("float32"), "the probability of all other classes together")
        else:
            centred = "" if multi_label else ", mean-centred"
            self._add("logits", _list(_value(self._dtype), cache.num_classes), f"the fused logits{centred}")
        if self._with_features:
            width = cache.recipe.fusion.feature_dim
            self._add("features", _list(_value("float32"), width), "the fused features")

    def _add(self, name: str, feature: Any, about: str) -> None:
        self.features[name], self.about[name] = feature, about

    @property
    def row_bytes(self) -> int:
        """About as many as a row has before compression."""
        found = 60
        if "logits" in self.features:
            found += self._cache.num_classes * (2 if self._dtype == "float16" else 4)
        if "classes" in self.features:
            found += 8 * (self._top or 64)
        return found + 4 * self._cache.recipe.fusion.feature_dim * self._with_features

    def schema(self) -> pa.Schema:
        import pyarrow as pa

        fields = [pa.field(name, _arrow(feature)) for name, feature in self.features.items()]
        return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": self.features}})})

    def table(self, view: int, block: int) -> pa.Table:
        """The rows of a block."""
        import pyarrow as pa

        cache, place = self._cache, self._cache.manifest.block(block)
        targets = cache.load_view(view, features=self._with_features, blocks=[block])
        samples = np.arange(place.start, place.stop, dtype=np.int64)
        keys = cache.sample_keys[place]
        columns: dict[str, Any] = {
            "view": np.full(len(samples), view, np.int32),
            "sample": samples,
            "key": [key.tobytes().hex() for key in keys],
        }
        if self._names is not None:
            columns["file_name"] = self._names[place]
        labels = cache.labels[place]
        if labels.ndim == 2:
            columns["labels"] = [np.flatnonzero(row).tolist() for row in labels]
        else:
            columns["label"] = labels
        if self._has_seeds:
            columns["tool_seed"] = cache.view_seeds(view, place)
        columns |= self._logits(targets)
        if self._with_features:
            columns["features"] = _fixed(targets.features(slice(None)).numpy())
        schema = self.schema()
        arrays = [
            value if isinstance(value, pa.Array) else pa.array(value, schema.field(name).type)
            for name, value in ((name, columns[name]) for name in schema.names)
        ]
        return pa.Table.from_arrays(arrays, schema=schema)

    def _logits(self, targets: ViewTargets) -> dict[str, Any]:
        if "logits" in self.features:
            return {"logits": _fixed(targets.logits(slice(None)).numpy().astype(self._dtype))}
        if self._top is None:
            assert self._sparse is not None, "the columns of a sparse codec"
            found = targets.sparse_logits(slice(None), self._sparse.temperature)
            classes, p = found.classes.numpy(), np.exp(found.log_p.numpy().astype(np.float64))
            known = classes < self._cache.num_classes
            rest = np.exp(found.log_tail.numpy().astype(np.float64))
        else:
            logits = targets.logits(slice(None)).double()
            probabilities = logits.softmax(dim=1)
            best = probabilities.topk(self._top, dim=1)
            classes, p = best.indices.numpy(), best.values.numpy()
            known = np.ones(classes.shape, np.bool_)
            rest = np.maximum(1.0 - p.sum(axis=1), 0.0)
        return {
            "classes": _ragged(classes.astype(np.int32), known),
            "probabilities": _ragged(p.astype(np.float32), known),
            "rest": rest.astype(np.float32),
        }


def _write_shards(rows: _Rows, folder: Path, views: list[int], shard_bytes: int) -> tuple[int, int]:
    """Write the parquet files; their number, and their bytes."""
    from pyarrow import parquet

    manifest = rows._cache.manifest
    blocks = [(view, block) for view in views for block in range(manifest.num_blocks)]
    at_once = max(shard_bytes // (rows.row_bytes * manifest.block_rows), 1)
    shards = [blocks[first : first + at_once] for first in range(0, len(blocks), at_once)]
    folder.mkdir(parents=True)
    split, total = _split_name(rows._cache), 0
    with Progress("export", len(views) * manifest.num_samples, "rows") as progress:
        for number, chosen in enumerate(shards):
            file = folder / f"{split}-{number:05}-of-{len(shards):05}.parquet"
            with parquet.ParquetWriter(file, rows.schema(), compression="zstd") as writer:
                for view, block in chosen:
                    table = rows.table(view, block)
                    writer.write_table(table)
                    progress.advance(len(table))
            total += os.path.getsize(file)
    return len(shards), total


def _check_free(out: Path, overwrite: bool) -> None:
    """Raise StorageError unless nothing is at `out`, or an earlier export that may be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise StorageError("something else is where the export should be", where=out, next_step="choose another OUT")
    if not out.is_dir() or not any(out.iterdir()):
        return
    is_export = (out / MARKER).is_file() and not (out / MARKER).is_symlink()
    if not is_export:
        raise StorageError(
            "a folder with other files is where the export should be",
            where=out,
            expected="no folder, or an earlier export",
            next_step="choose another OUT",
        )
    if not overwrite:
        raise StorageError("an export is here already", where=out, next_step="choose another OUT, or add --overwrite")


def _put_in_place(temporary: Path, out: Path) -> None:
    """Rename the new folder to `out`; an earlier export is moved away first and then removed."""
    old: Path | None = None
    if out.is_dir():
        old = out.with_name(f".{out.name}.{uuid.uuid4().hex}{PARTIAL}")
        os.rename(out, old)
    os.rename(temporary, out)
    sync_folder(out.parent)
    if old is not None:
        remove_leftover(old)


def _file_names(cache: TeacherCache, data_dir: Path | None) -> list[str]:
    stored = cache.manifest.dataset
    if not stored.has_image_files:
        raise DataError("the images of this cache have no files", where=stored.name, next_step="leave --file-names out")
    dataset = as_received(stored, cache.path, data_dir=data_dir).located(data_dir)
    images = aligned(cache, open_cached(cache, dataset))
    assert isinstance(images, EncodedImages), "images that are files"
    return [images.name_of(sample) for sample in range(len(images))]


def _split_name(cache: TeacherCache) -> str:
    """The split as the hub allows it: letters, digits, underscores and dots."""
    name = whole_split(cache.recipe.dataset.split)
    return name if _SPLIT.fullmatch(name) else "train"


# The features of the package `datasets`, and arrow


def _value(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "_type": "Value"}


def _list(feature: Any, length: int = -1) -> dict[str, Any]:
    return {"feature": feature, "length": length, "_type": "List"}


def _arrow(feature: dict[str, Any]) -> pa.DataType:
    import pyarrow as pa

    if feature["_type"] == "List":
        return pa.list_(_arrow(feature["feature"]), feature["length"])
    return pa.int64() if feature["_type"] == "ClassLabel" else pa.type_for_alias(feature["dtype"])


def _fixed(values: np.ndarray) -> pa.Array:
    """Rows of one width as an array of lists of this length."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def _ragged(values: np.ndarray, known: np.ndarray) -> pa.Array:
    """The known numbers of each row as lists."""
    import pyarrow as pa

    ends = np.concatenate([[0], np.cumsum(known.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values[known]))


# The card


def _card(cache: TeacherCache, rows: _Rows, views: list[int], split: str) -> str:
    import yaml

    manifest, recipe = cache.manifest, cache.recipe
    header = {
        "license": "unknown",
        "pretty_name": f"Targets of {printable(manifest.name)}",
        "task_categories": ["image-classification"],
        "tags": ["knowledge-distillation", "teacher-cache"],
        "configs": [
            {"config_name": "default", "data_files": [{"split": split, "path": f"data/{split}-*.parquet"}]},
        ],
    }
    names = ", ".join(recipe.dataset.class_names[:5]) + (", …" if cache.num_classes > 5 else "")
    lines = [
        f"# Targets of {_plain(manifest.name)}",
        "",
        "What teachers said of images, for knowledge distillation: a row for each view of each image. The images are "
        "not in it; `key` and `sample` say which one a row is about.",
        "",
        "> **Licence**: not chosen. Choose one in the header of this card before you publish it, in keeping with the "
        "licences of the images and of the networks.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_plain(text)} |" for name, text in _facts(cache, views, names)),
        "",
        "| column | type | what it has |",
        "|---|---|---|",
        *(f"| `{name}` | {_type_of(rows.features[name])} | {about} |" for name, about in rows.about.items()),
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        f'rows = load_dataset("FOLDER_OR_NAME", split="{split}")  # streaming=True reads it piece by piece',
        "```",
        "",
        "## Views",
        "",
        *_about_views(cache),
        "",
        "```yaml",
        *_fenced(dump_yaml(recipe.views)),
        "```",
        "",
        "## Fusion",
        "",
        "```yaml",
        *_fenced(dump_yaml(recipe.fusion)),
        "```",
        "",
        f"Made with [teacher-cache](https://pypi.org/project/teacher-cache/) from the cache {manifest.fingerprint}.",
        "",
    ]
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=False, width=200)
    return "\n".join(["---", front.rstrip("\n"), "---", "", *lines])


def _facts(cache: TeacherCache, views: list[int], names: str) -> Iterator[tuple[str, str]]:
    recipe, dataset = cache.recipe, cache.recipe.dataset
    yield "images", f"{dataset.name}, split {dataset.split}: {dataset.num_samples:,}"
    yield "classes", f"{cache.num_classes:,}: {names}"
    yield (
        "views",
        f"{len(views)} of {cache.num_views}: {', '.join(map(str, views[:12]))}{', …' if len(views) > 12 else ''}",
    )
    for teacher in recipe.teachers:
        yield "teacher", f"{teacher.architecture}, weights {teacher.weights_digest[:12]}, share {teacher.weight:g}"
    for clip in recipe.clips:
        yield "CLIP", f"{clip.architecture}, weights {clip.weights_digest[:12]}, share {clip.weight:g}"
        yield "prompts", f"{len(clip.templates)}, the first: {clip.templates[0]}"
    yield "fusion", describe_fusion(cache.manifest)
    yield "codec of the cache", str(recipe.codecs)
    if recipe.imported is not None:
        mean = "" if recipe.imported.averaged is None else f", the mean over {recipe.imported.averaged} views"
        yield "imported from", f"{recipe.imported.kind}{mean}"


def _about_views(cache: TeacherCache) -> list[str]:
    views = cache.recipe.views
    if views.made_by is not None:
        return [f"The views were drawn by {views.made_by.tool}; teacher-cache cannot make their pixels again."]
    return [
        "A view is a function of this recipe, its number and the number of the image. teacher-cache makes the pixels "
        "that the teachers saw: `ViewRecipe.model_validate(recipe).apply(images, index, view)`.",
    ]


def _type_of(feature: dict[str, Any]) -> str:
    if feature["_type"] == "List":
        length = feature["length"]
        return f"list of {_type_of(feature['feature'])}" + (f" [{length}]" if length >= 0 else "")
    return "class label" if feature["_type"] == "ClassLabel" else str(feature["dtype"])


def _plain(text: str) -> str:
    """Text from a cache in a table of Markdown: it stays in its cell, and is no markup."""
    line = escape(printable(text))
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", line)


def _fenced(text: str) -> list[str]:
    """YAML whose text cannot end the block."""
    return [printable(line).replace("```", "'''") for line in text.rstrip("\n").split("\n")]


def _require_pyarrow(out: Path) -> None:
    try:
        import pyarrow as pa  # noqa: F401
    except ImportError as error:
        raise DataError(
            "Hugging Face data sets need the package pyarrow",
            where=out,
            next_step="install it: pip install 'teacher-cache[hf]'",
        ) from error
