"""A Hugging Face data set on the disk as an image source; `cache_tools.images.open_images` opens it.

The files are read with pyarrow, not with the package `datasets`. Arrow files are mapped into memory. Parquet files do
not allow reading one image, so they are unpacked once into an Arrow file in the cache home. Either way only the images
in use are in memory. Samples are the rows in order, and their keys are hashes of the encoded bytes, as for files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_tools.console import Progress
from cache_tools.errors import DataError
from cache_tools.files import cache_home, replaced_durably
from cache_tools.images.class_names import Names, arrange, listed
from cache_tools.images.decode import PixelRules
from cache_tools.images.encoded import DEFAULT_IMAGE_SIZE, EncodedImages
from cache_tools.images.hf_layout import find_hf_files
from cache_tools.images.image_set import KEY_BYTES, sample_key
from cache_tools.images.index import PROGRESS_FROM_FILES, num_workers, read_image
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.images.summary import FolderSummary
from cache_tools.system.arguments import expand_user

if TYPE_CHECKING:
    import pyarrow as pa

UNPACKED = "unpacked-images"  # folder in the cache home
_LABEL_NAMES = ("label", "labels", "class", "category", "target")
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_BATCH_ROWS = 256  # of Parquet files while they are unpacked


@dataclass(frozen=True, eq=False, kw_only=True)
class HfImages(EncodedImages):
    """A split whose images are rows of Arrow files.

    Attributes:
        column: the images of all rows.
        rows: int64 [N], the row of each sample.
    """

    column: ImageColumn
    rows: np.ndarray

    def read(self, sample: int) -> bytes:
        data, path = self.column.read(int(self.rows[sample]))
        if data is None and path and (file := self.summary.root / path).exists():  # an absolute path stays as it is
            return read_image(file)
        if not data:
            raise DataError("not an image", where=self.place_of(sample), found="no image and no file of that name")
        return data

    def name_of(self, sample: int) -> str:
        row = int(self.rows[sample])
        path = self.column.path(row)
        return f"{self.split}, row {row}" + (f" ({path})" if path else "")

    def _fields_at(self, rows: slice | np.ndarray) -> dict[str, Any]:
        return {"rows": self.rows[rows]}


class ImageColumn:
    """The images of Arrow files, mapped into memory on first use; pickling takes only the names along."""

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self.files, self.name = tuple(files), name

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "name": self.name}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, row: int) -> tuple[bytes | None, str | None]:
        """The encoded bytes of a row and the path that it names; None for what it lacks."""
        chunk, place = self._find(row)
        value = chunk[0][place].as_buffer() if len(chunk[0]) else None
        return None if value is None else value.to_pybytes(), self._path(chunk, place)

    def path(self, row: int) -> str | None:
        """The path that a row names."""
        return self._path(*self._find(row))

    def _path(self, chunk: tuple[Any, Any], place: int) -> str | None:
        return None if chunk[1] is None else chunk[1][place].as_py()

    def _find(self, row: int) -> tuple[tuple[Any, Any], int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._chunks[number], row - int(self._starts[number])

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum([len(chunk[0]) for chunk in self._chunks], dtype=np.int64)])

    @cached_property
    def _chunks(self) -> list[tuple[Any, Any]]:
        """(bytes, path) of each record batch."""
        chunks = []
        for file in self.files:
            with _reading(file):
                column = _open_arrow(file).column(self.name)
                column.validate(full=True)  # offsets that point outside of the file would end the process
                chunks += [_parts(chunk) for chunk in column.chunks]
        return [chunk for chunk in chunks if len(chunk[0])]


def open_hf(recipe: DatasetRecipe, split: str) -> HfImages:
    """Open a split of a Hugging Face data set. Every image is read for its key, and none is decoded.

    Raises:
        DataError: no such split or column, a column that could be one of several, rows without a label, files that are
            missing or damaged, or no pyarrow.
    """
    assert recipe.data_dir is not None  # validated by the recipe
    _require_pyarrow(recipe.data_dir)
    found = find_hf_files(expand_user(recipe.data_dir))
    files = found.splits.get(split)
    if files is None:
        raise DataError(
            "the data set has no such split",
            where=found.root,
            expected=f"one of {', '.join(found.splits)}",
            found=split,
            next_step=f"set dataset.{'split' if split == recipe.split else 'test_split'} to one of them"
            + ("" if split == recipe.split else ", to a part such as train[80%:], or to null"),
        )
    with _reading(files[0]):  # pyarrow decodes the names of columns when they are asked for
        schema = _schema(files[0])
        features = found.features | _schema_features(schema)
        image = _image_column(schema, features, recipe.image_column, found.root)
        label = _label_column(schema, features, recipe.label_column, image, found.root)
    arrow = [_as_arrow(file, image, label) for file in files]
    class_names, labels = _labels(arrow, label, features.get(label), recipe, f"{found.root}, split {split}")
    column = ImageColumn(arrow, image)
    size = recipe.image_size or DEFAULT_IMAGE_SIZE
    return HfImages(
        name=recipe.name,
        split=split,
        class_names=class_names,
        labels=labels,
        keys=_keys(column, found.root),
        image_size=(size, size),
        rules=PixelRules(recipe.background_colour, recipe.value_range),
        summary=FolderSummary(found.root, len(labels)),
        column=column,
        rows=np.arange(len(labels)),
    )


def _keys(column: ImageColumn, root: Path) -> np.ndarray:
    """The content key of each row. A row whose image is missing has a key of its own, and a check names it."""

    def key(row: int) -> bytes:
        data, path = column.read(row)
        if data is None and path and (file := root / path).is_file():
            with suppress(DataError):
                data = read_image(file)
        return sample_key(data or f"no image in row {row}".encode())

    count = len(column)
    found = []
    progress = Progress("hash images", count, "images") if count >= PROGRESS_FROM_FILES else None
    with ThreadPoolExecutor(num_workers()) as pool:
        if progress is not None:
            with progress:
                for one in pool.map(key, range(count), chunksize=64):
                    found.append(one)
                    progress.advance(1)
        else:
            found = list(pool.map(key, range(count)))
    return np.frombuffer(bytearray(b"".join(found)), np.uint8).reshape(-1, KEY_BYTES)


def _image_column(schema: pa.Schema, features: Mapping[str, Any], chosen: str | None, root: Path) -> str:
    """The column of encoded images: the one named, or the only one."""
    said = [name for name in schema.names if _kind(features.get(name)) == "Image" and _holds_bytes(schema, name)]
    found = said or [name for name in schema.names if _is_image_struct(schema.field(name).type)]
    found = found or [name for name in schema.names if _holds_bytes(schema, name)]
    if chosen is not None:
        if chosen in schema.names and _holds_bytes(schema, chosen):
            return chosen
        raise _bad_column("image_column", chosen, "no such column of encoded images", root, schema, found)
    if len(found) != 1:
        what = "there are several columns of images" if found else "there is no column of encoded images"
        raise _bad_column("image_column", None, what, root, schema, found)
    return found[0]


def _label_column(schema: pa.Schema, features: Mapping[str, Any], chosen: str | None, image: str, root: Path) -> str:
    """The column of labels: the one named; the only one with class names; or one with a customary name."""
    others = [name for name in schema.names if name != image and _can_label(schema.field(name).type)]
    if chosen is not None:
        if chosen in others:
            return chosen
        raise _bad_column("label_column", chosen, "no such column of labels", root, schema, others)
    classes = [name for name in others if _class_names(features.get(name)) is not None]
    for some in (classes, [name for name in others if name.lower() in _LABEL_NAMES], others):
        if len(some) == 1:
            return some[0]
        if named := [name for name in some if name == "label"]:
            return named[0]
        if some:
            raise _bad_column("label_column", None, "several columns may be the labels", root, schema, some)
    raise _bad_column("label_column", None, "there is no column of labels", root, schema, [])


def _bad_column(
    key: str, chosen: str | None, what: str, root: Path, schema: pa.Schema, candidates: Sequence[str]
) -> DataError:
    return DataError(
        what,
        where=root if chosen is None else f"{root}, dataset.{key}={chosen}",
        expected="bytes of JPEG, PNG or other image files" if key == "image_column" else "numbers or names",
        found=f"the columns {listed([f'{field.name} ({field.type})' for field in schema])}",
        next_step=f"choose one of {listed(candidates)}, such as --set dataset.{key}={candidates[-1]}"
        if candidates
        else "save the data set with such a column, an Image or a ClassLabel of the package datasets",
    )


def _labels(
    files: Sequence[Path], name: str, feature: Any, recipe: DatasetRecipe, where: str
) -> tuple[Names, np.ndarray]:
    """The class names, and the labels of all rows: int64 [N], or uint8 [N, C] of a column of lists."""
    values: list[Any] = []
    for file in files:
        with _reading(file):
            column = _open_arrow(file).column(name)
            column.validate(full=True)
            values += column.to_pylist()
    if not values:
        raise DataError("a split without rows", where=where)
    multi_label = any(isinstance(value, list) for value in values)
    rows = [value or [] for value in values] if multi_label else [[value] for value in values]
    names = _class_names(feature)
    used = {one for row in rows for one in row}
    without = [number for number, row in enumerate(rows) if None in row or (names and -1 in row)]
    if without:
        raise DataError(
            f"{len(without):,} of {len(rows):,} rows have no label",
            where=where,
            found=f"row {without[0]}, {name}: {values[without[0]]}",
            next_step="choose another split, such as --set dataset.test_split=validation, or remove these rows",
        )
    if names is None:
        ordered = sorted(used, key=lambda one: (isinstance(one, str), one))
        names, numbers = tuple(str(one) for one in ordered), {one: number for number, one in enumerate(ordered)}
    else:
        numbers = {number: number for number in range(len(names))}
        numbers |= {each: number for number, each in enumerate(names)}  # some files hold the names themselves
        if unknown := [one for one in used if one not in numbers]:
            raise DataError(
                "labels that are no number of a class",
                where=where,
                expected=f"0 to {len(names) - 1}",
                found=f"{name}: {listed([str(one) for one in unknown])}",
            )
    if twice := [one for one, count in Counter(names).items() if count > 1]:
        raise DataError("class names that are there twice", where=f"{where}, column {name}", found=listed(twice))
    order = names if recipe.class_order == "sorted" else arrange(names, recipe.class_order)
    place = {number: order.index(names[number]) for number in range(len(names))}
    if not multi_label:
        return order, np.array([place[numbers[row[0]]] for row in rows], np.int64)
    labels = np.zeros((len(rows), len(names)), np.uint8)
    for number, row in enumerate(rows):
        labels[number, [place[numbers[one]] for one in row]] = 1
    return order, labels


def _kind(feature: Any) -> str | None:
    return feature.get("_type") if isinstance(feature, Mapping) else None


def _class_names(feature: Any) -> Names | None:
    """The names of a ClassLabel, or of a list of them."""
    if isinstance(feature, list) and len(feature) == 1:  # how older versions of `datasets` write a list
        feature = feature[0]
    if isinstance(feature, Mapping) and _kind(feature) in {"Sequence", "List", "LargeList"}:
        feature = feature.get("feature")
    names = feature.get("names") if isinstance(feature, Mapping) and _kind(feature) == "ClassLabel" else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def _is_image_struct(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    names = {kind.field(number).name for number in range(kind.num_fields)} if types.is_struct(kind) else set()
    return "bytes" in names and names <= {"bytes", "path"}


def _holds_bytes(schema: pa.Schema, name: str) -> bool:
    import pyarrow.types as types

    kind = schema.field(name).type
    if _is_image_struct(kind):
        kind = kind.field("bytes").type
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _can_label(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_integer(kind) or types.is_boolean(kind) or types.is_string(kind) or types.is_large_string(kind)


def _parts(chunk: Any) -> tuple[Any, Any]:
    """(bytes, path) of a batch of images; no path in a column of plain bytes."""
    if not _is_image_struct(chunk.type):
        return chunk, None
    fields = dict(zip((field.name for field in chunk.type), chunk.flatten(), strict=True))
    return fields["bytes"], fields.get("path")


def _schema_features(schema: pa.Schema) -> dict[str, Any]:
    """The features that the package `datasets` stores in the schema of its files."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return dict(features) if isinstance(features, Mapping) else {}


def _schema(file: Path) -> pa.Schema:
    with _reading(file):
        if file.suffix == ".parquet":
            from pyarrow import parquet

            schema = parquet.read_schema(file)
        else:
            schema = _arrow_reader(file).schema
        if len(set(schema.names)) < len(schema.names):
            raise ValueError("two columns have the same name")
        return schema


def _open_arrow(file: Path) -> pa.Table:
    """An Arrow file as a table whose columns are mapped into memory."""
    return _arrow_reader(file).read_all()


def _arrow_reader(file: Path) -> Any:
    import pyarrow as pa

    source = pa.memory_map(str(file))
    size, is_random_access = source.size(), source.read(6) == b"ARROW1"
    if not is_random_access:
        source.seek(max(size - len(_END_OF_STREAM), 0))
        if source.read() != _END_OF_STREAM:  # pyarrow takes a file that was cut between two batches for a whole one
            raise ValueError("the file has no end")
    source.seek(0)
    return pa.ipc.open_file(source) if is_random_access else pa.ipc.open_stream(source)


def _as_arrow(file: Path, *columns: str) -> Path:
    """The file itself, or the unpacked copy of these columns of a Parquet file, which is written unless it is there."""
    if file.suffix == ".arrow":
        return file
    import pyarrow as pa
    from pyarrow import parquet

    status = file.stat()
    identity = json.dumps([str(file.resolve()), status.st_size, status.st_mtime_ns, *columns])
    copy = cache_home() / UNPACKED / f"{hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()}.arrow"
    if copy.is_file():
        with suppress(OSError):  # its time says when it was last used, for `cache-tools prune`
            os.utime(copy)
        return copy
    with _reading(file):
        source = parquet.ParquetFile(file)
        schema = pa.schema([source.schema_arrow.field(name) for name in columns])
        batches = source.iter_batches(_BATCH_ROWS, columns=list(columns))
    progress = Progress(f"unpack {file.name}", source.metadata.num_rows, "images")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replaced_durably(copy) as sink, pa.ipc.new_stream(sink, schema) as writer, progress:
            for batch in _read_all(batches, file):
                writer.write_batch(batch.select(list(columns)))
                progress.advance(len(batch))
    except OSError as error:
        raise DataError(
            "cannot unpack a Parquet file",
            where=copy,
            found=error.strerror or str(error),
            next_step="make room there, or set TEACHER_CACHE_HOME to another folder",
        ) from error
    return copy


def _read_all(batches: Iterator[Any], file: Path) -> Iterator[Any]:
    while True:
        with _reading(file):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raise DataError for whatever pyarrow says of a file that is missing, cut or damaged."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(
            "cannot read a file of the data set",
            where=file,
            found=str(error).partition("\n")[0] or type(error).__name__,
            next_step="copy, download or save the data set again",
        ) from error


def _require_pyarrow(where: Path) -> None:
    try:
        import pyarrow as pa  # noqa: F401
    except ImportError as error:
        raise DataError(
            "Hugging Face data sets need the package pyarrow",
            where=where,
            next_step="install it: pip install 'teacher-cache[hf]'",
        ) from error
