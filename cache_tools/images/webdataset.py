"""Tar shards as an image source (WebDataset); `cache_tools.images.open_images` opens them.

A shard is read once, for an index of its samples in the cache home: shard, offset, size, key, label, height and width.
Later only shards that changed are read. A pack of `cache-tools pack-images` brings its index along. Needs no package
`webdataset`. Samples are those of the shards in order, and their keys are hashes of the image files, as in a folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cache_tools.config.text import parse_json
from cache_tools.console import Progress
from cache_tools.errors import DataError, FormatError, UnsafeFileError
from cache_tools.files import SafeFolder, cache_home
from cache_tools.images.class_names import Names, names_in
from cache_tools.images.decode import PixelRules, whole_images_only
from cache_tools.images.encoded import DEFAULT_IMAGE_SIZE, EncodedImages
from cache_tools.images.index import FOLDER, YOUNG_NS, num_workers
from cache_tools.images.labels import number_labels
from cache_tools.images.recipe import DatasetIdentity, DatasetRecipe
from cache_tools.images.shard_files import (
    CLASSES,
    PACK_INDEX,
    PACK_RECORD,
    Shard,
    ShardPlace,
    ShardReader,
    find_shards,
    is_pattern,
    open_shard,
    shard_place,
)
from cache_tools.images.summary import FolderSummary, some_names
from cache_tools.images.tar_samples import Samples, read_samples
from cache_tools.units import counted

if TYPE_CHECKING:
    import polars as pl

_VERSION = 1  # of the stored columns
_MAX_BYTES, _MAX_NAMES_BYTES = 16 << 30, 16 << 20


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardImages(EncodedImages):
    """A split whose images are files in tar shards.

    Attributes:
        shards: reads them.
        columns: a row per sample: `name`, `shard` (its number), `offset` and `size` in bytes, `height` and `width`.
        reduced: (longest side, JPEG quality) of images that were made smaller when they were packed.
    """

    shards: ShardReader
    columns: pl.DataFrame
    reduced: tuple[int, int] | None = None

    def read(self, sample: int) -> bytes:
        row = self.columns.row(sample, named=True)
        data = self.shards.read(row["shard"], row["offset"], row["size"])
        if not data:
            raise DataError("not an image", where=self.place_of(sample), found="an empty file")
        return data

    def header_sizes(self) -> np.ndarray:
        return self.columns.select("height", "width").to_numpy()

    def place_of(self, sample: int) -> str:
        return f"{self.shards.place.folder}/{self.name_of(sample)}"

    def name_of(self, sample: int) -> str:
        row = self.columns.row(sample, named=True)
        return f"{self.shards.shards[row['shard']].name}/{row['name']}"

    def _fields_at(self, rows: slice | np.ndarray) -> dict[str, Any]:
        return {"columns": self.columns[rows]}

    def identity(self) -> DatasetIdentity:
        return super().identity().model_copy(update={"reduced": self.reduced})


def open_webdataset(recipe: DatasetRecipe, split: str) -> ShardImages:
    """Open the shards of a split. Only those that no index knows are read; no image is decoded.

    Raises:
        DataError: no shards, damaged ones, samples without a label, or labels of no class.
    """
    assert recipe.data_dir is not None  # validated by the recipe
    _check_test_split(recipe, split)
    place = shard_place(recipe.data_dir, split)
    shards = find_shards(place, copies=recipe.remote_shards == "copy")
    table, left_out = index_shards(place, shards, recipe)
    if not len(table):
        raise DataError("shards without an image", where=place, found=some_names(list(left_out.values())) or None)
    without = table["label"].is_null()
    if without.any():
        names = table["name"].filter(without)
        raise DataError(
            f"{counted(len(names), 'sample')} of {len(table):,} without a label",
            where=place,
            expected="a file .cls beside each image, or .json with a field label",
            found=some_names(names.head(4).to_list() + [""] * (len(names) - 4)),
            next_step="name another file or field with --set dataset.label_column=…",
        )
    class_names, labels = number_labels(
        table["label"],
        recipe.class_order,
        names=_class_names(place),
        is_training=split == recipe.split.partition("[")[0],
        where=place,
    )
    size = recipe.image_size or DEFAULT_IMAGE_SIZE
    root = Path(place.folder) if place.is_remote else Path(os.path.abspath(place.folder))
    return ShardImages(
        name=recipe.name,
        split=split,
        class_names=class_names,
        labels=labels,
        keys=keys_of(table),
        image_size=(size, size),
        rules=PixelRules(recipe.background_colour, recipe.value_range),
        summary=FolderSummary(root, len(table), left_out=left_out),
        shards=ShardReader(place, shards),
        columns=table.select("name", "shard", "offset", "size", "height", "width").rechunk(),
        reduced=pack_record(place).get("reduced"),
    )


def _check_test_split(recipe: DatasetRecipe, split: str) -> None:
    """Raise DataError for a test split whose images would be those of training, as a pattern names one split."""
    assert recipe.data_dir is not None
    whole = recipe.split.partition("[")[0]
    if is_pattern(recipe.data_dir) and not is_pattern(split) and split.partition("[")[0] != whole:
        raise DataError(
            "a pattern of shards is one split",
            where=recipe.data_dir,
            expected="a test split with shards of its own",
            found=f"dataset.test_split={split}",
            next_step="set dataset.test_split to a pattern such as test-*.tar, to a part such as "
            f"{whole}[80%:], or to null",
        )


def index_shards(
    place: ShardPlace, shards: Sequence[Shard], recipe: DatasetRecipe
) -> tuple[pl.DataFrame, dict[str, str]]:
    """The samples of shards in order, and the files that are none with the reason.

    The columns are those of `schema`, with the number of the shard in place of its name.
    """
    import polars as pl

    path = cache_home() / FOLDER / f"{_digest(place, recipe)}.parquet"
    states = {shard.name: shard.state for shard in shards}
    stored = _load(path)
    if stored is not None and _states_of(stored) == states:
        return _numbered(stored, shards)
    known = _known(stored, states)
    found = _states_of(known)
    new = [shard for shard in shards if shard.name not in found]
    if new and recipe.image_column is None and recipe.label_column is None:
        packed = _of_pack(place, new)
        known, found = pl.concat([known, packed]), _states_of(packed)
        new = [shard for shard in new if shard.name not in found]
    table = pl.concat([known, *_read_new(place, new, recipe)])
    _store(path, table, shards)
    return _numbered(table, shards)


def schema() -> dict[str, Any]:
    """The columns of a stored index: the place of each sample, its content key in two halves, and what is known of it.

    `state` is of the whole shard; `reason` is why a file is no sample.
    """
    import polars as pl

    return {
        "shard": pl.String,
        "state": pl.String,
        "name": pl.String,
        "offset": pl.Int64,
        "size": pl.Int64,
        "key_high": pl.UInt64,
        "key_low": pl.UInt64,
        "label": pl.String,
        "height": pl.Int32,
        "width": pl.Int32,
        "reason": pl.String,
    }


def as_table(shard: str, state: str, samples: Samples) -> pl.DataFrame:
    """The samples of a shard, and the files that are none, as columns of `schema`."""
    import polars as pl

    keys = np.frombuffer(b"".join(samples.keys), ">u8").reshape(-1, 2).astype(np.uint64)
    count, others = len(samples.names), samples.left_out
    none = [None] * len(others)
    zeros = [0] * len(others)
    return pl.DataFrame(
        {
            "shard": pl.Series([shard] * (count + len(others)), dtype=pl.String),
            "state": pl.Series([state] * (count + len(others)), dtype=pl.String),
            "name": pl.Series([*map(_text, samples.names), *map(_text, others)], dtype=pl.String),
            "offset": pl.Series(samples.offsets + zeros, dtype=pl.Int64),
            "size": pl.Series(samples.sizes + zeros, dtype=pl.Int64),
            "key_high": pl.Series([*keys[:, 0].tolist(), *zeros], dtype=pl.UInt64),
            "key_low": pl.Series([*keys[:, 1].tolist(), *zeros], dtype=pl.UInt64),
            "label": pl.Series([*samples.labels, *none], dtype=pl.String),
            "height": pl.Series(samples.heights + zeros, dtype=pl.Int32),
            "width": pl.Series(samples.widths + zeros, dtype=pl.Int32),
            "reason": pl.Series([None] * count + list(others.values()), dtype=pl.String),
        }
    )


def keys_of(table: pl.DataFrame) -> npt.NDArray[np.uint8]:
    """The content keys, uint8 [N, 16]."""
    halves = np.stack([table["key_high"].to_numpy(), table["key_low"].to_numpy()], axis=1)
    return np.ascontiguousarray(halves.astype(">u8")).view(np.uint8).reshape(-1, 16)


def pack_record(place: ShardPlace) -> dict[str, Any]:
    """What `cache-tools pack-images` wrote about a pack; empty for other shards."""
    data = place.read(PACK_RECORD, _MAX_NAMES_BYTES)
    if data is None:
        return {}
    found = parse_json(data, "a damaged record of a pack", where=f"{place.folder}/{PACK_RECORD}", error=DataError)
    reduced = found.get("reduced") if isinstance(found, dict) else None
    is_pair = (
        isinstance(reduced, list) and len(reduced) == 2 and all(type(each) is int and each > 0 for each in reduced)
    )
    return {**found, "reduced": tuple(reduced) if is_pair and reduced else None} if isinstance(found, dict) else {}


def _class_names(place: ShardPlace) -> Names | None:
    """The names of the classes by number, of a file beside the shards."""
    data = place.read(CLASSES, _MAX_NAMES_BYTES)
    if data is None:
        return None
    where = f"{place.folder}/{CLASSES}"
    names = names_in(parse_json(data, "a damaged list of class names", where=where, error=DataError))
    if names is None or len(set(names)) < len(names):
        raise DataError("a damaged list of class names", where=where, expected="a JSON list of different names")
    return names


def _read_new(place: ShardPlace, shards: Sequence[Shard], recipe: DatasetRecipe) -> list[pl.DataFrame]:
    """The samples of shards that no index knows, read in threads."""
    if not shards:
        return []
    tables = []
    progress = Progress("read shards", sum(shard.size for shard in shards) >> 20, "MB")

    def read(shard: Shard) -> pl.DataFrame:
        where = f"{place.folder}/{shard.name}"
        try:
            with open_shard(place, shard) as file:
                samples = read_samples(file, shard.size, where, image=recipe.image_column, label=recipe.label_column)
        except OSError as error:
            raise DataError("cannot read a shard", where=where, found=error.strerror or error) from error
        return as_table(shard.name, shard.state, samples)

    with progress, whole_images_only(), ThreadPoolExecutor(min(num_workers(), 8)) as pool:
        for shard, table in zip(shards, pool.map(read, shards), strict=True):
            tables.append(table)
            progress.advance(shard.size >> 20)
    return tables


def _digest(place: ShardPlace, recipe: DatasetRecipe) -> str:
    """The name of the index of a split."""
    folder = place.folder if place.is_remote else str(Path(place.folder).resolve())
    text = json.dumps([_VERSION, folder, place.names, place.split, recipe.image_column, recipe.label_column])
    return hashlib.blake2b(f"shards {text}".encode(errors="surrogateescape"), digest_size=16).hexdigest()


def _known(stored: pl.DataFrame | None, states: dict[str, str]) -> pl.DataFrame:
    """The rows of an index that are of shards as they are now."""
    import polars as pl

    if stored is None:
        return pl.DataFrame(schema=schema())
    same = [shard for shard, state in _states_of(stored).items() if states.get(shard) == state]
    return stored.filter(pl.col("shard").is_in(same))


def _states_of(table: pl.DataFrame) -> dict[str, str]:
    """Shard → state, of the rows of an index; none if a shard has several, as in a damaged one."""
    pairs = table.select("shard", "state").unique(maintain_order=True).rows()
    return dict(pairs) if len(dict(pairs)) == len(pairs) else {}


def _numbered(table: pl.DataFrame, shards: Sequence[Shard]) -> tuple[pl.DataFrame, dict[str, str]]:
    """The samples of an index in the order of the shards, by their numbers; and the files that are none."""
    import polars as pl

    number = {shard.name: number for number, shard in enumerate(shards)}
    runs = table["shard"].rle().struct  # the rows of a shard follow each other
    numbers = np.array([number[name] for name in runs.field("value").to_list()], np.int64)
    rows = np.repeat(numbers, runs.field("len").to_numpy())
    table = table.drop("shard", "state").with_columns(shard=pl.Series(rows, dtype=pl.Int64))
    if (np.diff(numbers) < 0).any():
        table = table.sort("shard", maintain_order=True)
    if table["reason"].null_count() == len(table):
        return table, {}
    out = table.filter(pl.col("reason").is_not_null())
    names = [f"{shards[shard].name}/{name}" for shard, name in out.select("shard", "name").iter_rows()]
    return table.filter(pl.col("reason").is_null()), dict(zip(names, out["reason"].to_list(), strict=True))


def _of_pack(place: ShardPlace, shards: Sequence[Shard]) -> pl.DataFrame:
    """The rows of these shards in the index of a pack, if it has them at their sizes."""
    import polars as pl

    data = place.read(PACK_INDEX, _MAX_BYTES)
    stored = None if data is None else _parse(data)
    if stored is None:
        return pl.DataFrame(schema=schema())
    states = pl.DataFrame(
        {
            "shard": [shard.name for shard in shards],
            "state": [str(shard.size) for shard in shards],
            "now": [shard.state for shard in shards],
        },
        schema={"shard": pl.String, "state": pl.String, "now": pl.String},
    )
    found = stored.join(states, on=["shard", "state"], maintain_order="left")
    return found.with_columns(state=pl.col("now")).select(*schema())


def _load(path: Path) -> pl.DataFrame | None:
    """The stored index; None if there is none that can be used."""
    try:
        return _parse(SafeFolder(path.parent.parent).below(path.parent.name).read_bytes(path.name, _MAX_BYTES))
    except (OSError, FormatError):
        return None


def _parse(data: bytes) -> pl.DataFrame | None:
    import polars as pl

    try:
        stored = pl.read_parquet(io.BytesIO(data))
    except pl.exceptions.PolarsError:
        return None
    counts = [stored[name].null_count() for name in schema() if name not in {"label", "reason"} and name in stored]
    is_whole = dict(stored.schema) == schema() and not any(counts)
    return stored if is_whole and bool(((stored["offset"] >= 0) & (stored["size"] >= 0)).all()) else None


def _store(path: Path, table: pl.DataFrame, shards: Sequence[Shard]) -> None:
    """Replace the stored index, without shards that are too young; without a writable home do nothing."""
    import polars as pl

    now = time.time_ns()
    young = [shard.name for shard in shards if shard.changed_ns >= now - YOUNG_NS]
    buffer = io.BytesIO()
    table.filter(~pl.col("shard").is_in(young)).write_parquet(buffer, compression="zstd")
    with suppress(OSError, UnsafeFileError):
        folder = SafeFolder(path.parent.parent).below(path.parent.name)
        folder.make_folder()
        folder.put(path.name, buffer.getbuffer())


def _text(name: str) -> str:
    """A name in a shard, which may be any bytes, as text that can be stored."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
