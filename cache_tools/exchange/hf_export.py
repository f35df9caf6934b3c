"""A cache as a Hugging Face data set: parquet files with a card, which `datasets.load_dataset(FOLDER)` opens.

A row is what the teachers said of one view of one image. Blocks are read, checked and written one after the other.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from contextlib import suppress
from pathlib import Path

from cache_tools.alignment import aligned, open_cached
from cache_tools.config import Frozen
from cache_tools.console import Progress, storage_error
from cache_tools.errors import DataError, NotFoundError, StorageError
from cache_tools.exchange.hf_card import dataset_card
from cache_tools.exchange.hf_rows import ExportedRows
from cache_tools.files import PARTIAL, remove_leftover, remove_leftovers, sync_folder, sync_tree
from cache_tools.images import whole_split
from cache_tools.images.encoded import EncodedImages
from cache_tools.images.recipe import as_received
from cache_tools.reader import TeacherCache

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
    rows = ExportedRows(cache, top=top, features=features, names=names)
    _check_free(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            shards, size = _write_shards(rows, temporary / "data", chosen, shard_bytes)
            split = _split_name(cache)
            (temporary / "README.md").write_text(dataset_card(rows, chosen, split), encoding="utf-8")
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


def _write_shards(rows: ExportedRows, folder: Path, views: list[int], shard_bytes: int) -> tuple[int, int]:
    """Write the parquet files; their number, and their bytes."""
    from pyarrow import parquet

    manifest = rows.cache.manifest
    blocks = [(view, block) for view in views for block in range(manifest.num_blocks)]
    at_once = max(shard_bytes // (rows.row_bytes * manifest.block_rows), 1)
    shards = [blocks[first : first + at_once] for first in range(0, len(blocks), at_once)]
    folder.mkdir(parents=True)
    split, total = _split_name(rows.cache), 0
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


def _require_pyarrow(out: Path) -> None:
    try:
        import pyarrow as pa  # noqa: F401
    except ImportError as error:
        raise DataError(
            "Hugging Face data sets need the package pyarrow",
            where=out,
            next_step="install it: pip install 'teacher-cache[hf]'",
        ) from error
