"""Logits in an `.npz` or parquet file, by file name, by sample number, by content key, or in the order of the images.

| array or column | what it has |
|---|---|
| `logits` | floating [N, C], or [V, N, C] for several views |
| `names` (`name`, `files`, `file`, `file_name`, `path`) | the image of each row, as a path |
| `index` | the number of its sample |
| `keys` (`key`) | its content key, uint8 [N, 16] or 32 hex digits |
| `classes` | the name of each column; without it, the columns are the dataset's classes in their order |
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cache_tools.codecs.presets import TargetCodecs
from cache_tools.console import Progress
from cache_tools.errors import DataError, RecipeError
from cache_tools.exchange.array_file import ArrayFile
from cache_tools.exchange.images import (
    rows_of_samples,
    samples_by_key,
    samples_named,
    samples_numbered,
    title_of,
)
from cache_tools.exchange.make import FLOOR, ImportedTargets, Kind, Rows
from cache_tools.images.image_set import KEY_BYTES, ImageSet
from cache_tools.views.recipe import ViewRecipe

NAMES = ("names", "name", "files", "file", "file_name", "path")
KEYS = ("keys", "key")
_AT_ONCE = 4096  # rows that are checked together
_SUM_TOLERANCE = 0.01  # of the probabilities of a row

Values = Literal["logits", "probabilities"]


class LogitsFile(ImportedTargets):
    """The targets of a file of logits.

    Args:
        values: what the numbers are.
        views: that the user has stated, if any: several need views that differ.

    Raises:
        DataError, FormatError: not such a file; rows of other images, missing rows, other classes, NaN.
    """

    kind: Kind = "logits"

    def __init__(self, path: Path, images: ImageSet, values: Values, views: ViewRecipe | None) -> None:
        self._file, self._values, self._images = ArrayFile(path), values, images
        self.notes: list[str] = []
        self._logits = self._open_logits(views)
        self.num_views = len(self._logits)
        self._columns = self._match_classes()
        self._rows = self._match_rows()
        self.digest = self._check_all()

    def codecs(self, num_classes: int) -> TargetCodecs:
        return TargetCodecs()

    def logits(self, view: int, samples: npt.NDArray[np.int64]) -> Rows:
        rows = np.asarray(self._logits[view][self._rows[samples]], dtype=np.float32)
        rows = rows if self._columns is None else rows[:, self._columns]
        if self._values == "probabilities":
            rows = np.log(np.maximum(rows, FLOOR / rows.shape[1]))
        return rows

    def _open_logits(self, views: ViewRecipe | None) -> npt.NDArray[Any]:
        file, images = self._file, self._images
        if "logits" not in file.names:
            raise DataError("no array `logits`", where=file.path, found=", ".join(file.names)[:300])
        shape, dtype = file.shape("logits"), file.dtype("logits")
        wide = shape if len(shape) == 3 else (1, *shape)
        if dtype.kind != "f" or len(wide) != 3 or not wide[0] or not wide[1]:
            raise DataError(
                "logits of a wrong kind",
                where=file.path,
                expected="floating [images, classes] or [views, images, classes]",
                found=f"{dtype} {list(shape)}",
            )
        classes = len(images.class_names)
        if wide[2] != classes:
            raise DataError(
                "logits of another number of classes",
                where=file.path,
                expected=f"{classes}, the classes of the dataset",
                found=wide[2],
            )
        if wide[1] > len(images):
            raise DataError(
                "more rows than images",
                where=file.path,
                expected=f"{len(images):,}, the images of split {images.split}",
                found=f"{wide[1]:,}",
                next_step="choose the split that the logits are of: --set dataset.split=…",
            )
        if wide[0] > 1 and (views is None or (not views.ops and views.mix is None)):
            raise RecipeError(
                "several views need a recipe that says how they differ",
                where="views.ops",
                expected="the views on which the logits were computed, such as --set views.ops=[pad-crop,flip]",
                found=f"logits {list(shape)}, and no such views",
            )
        logits = file.read("logits")
        return logits if logits.ndim == 3 else logits[None]

    def _match_classes(self) -> npt.NDArray[np.int64] | None:
        """The column of each class; None where the columns are in the order of the dataset."""
        file, names = self._file, self._images.class_names
        if "classes" not in file.names:
            self.notes.append(
                f"the file does not name its classes: its columns were taken in the dataset's order, {_listed(names)}"
            )
            return None
        given = [str(name) for name in file.read("classes").tolist()]
        plain = {_plain(name): place for place, name in enumerate(given)}
        missing = [name for name in names if _plain(name) not in plain]
        if missing or len(given) != len(names) or len(plain) != len(given):
            raise DataError(
                "other class names",
                where=f"{file.path}, classes",
                expected=_listed(names),
                found=_listed(given),
                next_step="name the columns as the dataset names its classes, or leave `classes` out",
            )
        columns = np.asarray([plain[_plain(name)] for name in names], dtype=np.int64)
        if np.array_equal(columns, np.arange(len(names))):
            self.notes.append("the classes of the file are those of the dataset, in the same order")
            return None
        self.notes.append("the classes of the file are those of the dataset in another order: columns were moved")
        return columns

    def _match_rows(self) -> npt.NDArray[np.int64]:
        """The row of each sample."""
        file, images, count = self._file, self._images, self._logits.shape[1]
        by_name, by_key = file.first(NAMES), file.first(KEYS)
        given = by_name or by_key or ("index" if "index" in file.names else None)
        if given is None:
            if count != len(images):
                raise DataError(
                    "fewer rows than images, and nothing says whose they are",
                    where=file.path,
                    expected=f"{len(images):,} rows in the order of the images, or an array `names` or `index`",
                    found=f"{count:,} rows",
                )
            self.notes.append("the rows were taken in the order of the images: the file has no names and no index")
            return np.arange(count, dtype=np.int64)
        where = f"{file.path}, {given}"
        if len(file.shape(given)) < 1 or file.shape(given)[0] != count:
            raise DataError(
                "not one entry for each row of the logits", where=where, expected=count, found=file.shape(given)
            )
        values = file.read(given)
        if given == by_name:
            samples = samples_named(images, [_text(value, where) for value in values.tolist()], where)
        elif given == by_key:
            samples = samples_by_key(images, _keys(values, where), where)
        else:
            samples = samples_numbered(images, values, where)
        return rows_of_samples(images, samples, where)

    def _check_all(self) -> str:
        """Read every number once: raises DataError for NaN and the like; returns the digest of what is imported."""
        digest = hashlib.blake2b(repr((self._values, self._logits.shape)).encode(), digest_size=16)
        total = self.num_views * len(self._images)
        with Progress("check", total, "rows") as progress:
            for view in range(self.num_views):
                for start in range(0, len(self._images), _AT_ONCE):
                    samples = np.arange(start, min(start + _AT_ONCE, len(self._images)), dtype=np.int64)
                    rows = np.asarray(self._logits[view][self._rows[samples]], dtype=np.float32)
                    self._check(rows, view, samples)
                    rows = rows if self._columns is None else rows[:, self._columns]
                    digest.update(np.ascontiguousarray(rows, dtype="<f4").data)
                    progress.advance(len(samples))
        return digest.hexdigest()

    def _check(self, rows: Rows, view: int, samples: npt.NDArray[np.int64]) -> None:
        wrong = ~np.isfinite(rows)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            title = title_of(self._images, int(samples[row]))
            raise DataError(
                "a number is not finite",
                where=f"{self._file.path}, logits, view {view}, {title}, class {column}",
                found=f"{rows[row, column]}",
            )
        sums, low = rows.sum(axis=1, dtype=np.float64), rows.min(axis=1)
        are_probabilities = (low >= 0.0) & (np.abs(sums - 1.0) <= _SUM_TOLERANCE)
        if self._values == "probabilities" and not are_probabilities.all():
            row = int(np.argmin(are_probabilities))
            raise DataError(
                "a row is no distribution",
                where=f"{self._file.path}, logits, view {view}, {title_of(self._images, int(samples[row]))}",
                expected="probabilities of 0 or more with the sum 1",
                found=f"the smallest {low[row]:.4g}, the sum {sums[row]:.6g}",
                next_step="leave --values out if these are logits",
            )
        if self._values == "logits" and not self._images.multi_label and are_probabilities.all():
            raise DataError(
                "these look like probabilities, not like logits: no number is negative, and every row adds up to 1",
                where=self._file.path,
                next_step="say so: --values probabilities",
            )


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_")


def _text(value: Any, where: str) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise DataError("names that are not text", where=where, found=type(value).__name__)
    return value


def _keys(values: npt.NDArray[Any], where: str) -> npt.NDArray[np.uint8]:
    if values.dtype == np.uint8 and values.ndim == 2 and values.shape[1] == KEY_BYTES:
        return np.ascontiguousarray(values)
    try:
        data = b"".join(bytes.fromhex(_text(value, where)) for value in values.tolist())
    except ValueError:
        data = b""
    if len(data) != len(values) * KEY_BYTES:
        raise DataError(
            "bad content keys", where=where, expected="uint8 [rows, 16], or 32 hex digits each", found=str(values.dtype)
        )
    return np.frombuffer(data, np.uint8).reshape(-1, KEY_BYTES)


def _listed(names: Any) -> str:
    return ", ".join(str(name)[:60] for name in list(names)[:4]) + (f", … ({len(names)})" if len(names) > 4 else "")
