"""A csv file of the labels of images that may have several, or none: its rows as paths and a matrix of 0 and 1."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from cache_tools.config.text import read_text
from cache_tools.errors import DataError
from cache_tools.images.class_names import listed

if TYPE_CHECKING:
    import polars as pl

PATH_COLUMNS = ("path", "file_name", "filename")
_OTHERS = {"split", "labels"}
_VALUES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "": 0}
_MAX_BYTES, _MAX_LABELS = 1 << 30, 1 << 33
_SECOND = re.compile(r"_duplicated_\d+$")
_FORMAT = "a column `path`, and either a column of 0 and 1 for each class or a column `labels` with names like a;b"


class LabelTable(NamedTuple):
    """The rows of a split.

    Attributes:
        class_names: the columns in their order or, of a column `labels`, the sorted names in all rows of the file.
        paths: relative to the images' folder, sorted.
        labels: uint8 [N, C], 1 where the image has the label.
    """

    class_names: tuple[str, ...]
    paths: tuple[str, ...]
    labels: npt.NDArray[np.uint8]


def has_splits(file: Path) -> bool:
    """Whether a csv file has a column `split`."""
    return "split" in _read(file).columns


def read_label_table(file: Path, split: str | None) -> LabelTable:
    """Read the rows of a split, or all rows if the file has no column `split`.

    Names in the column `labels` are separated by `;` or, if the file has none, by spaces.

    Raises:
        DataError: no such file, columns or rows, a path twice, or a value that is neither 0 nor 1.
    """
    table = _read(file)
    path_column = next((name for name in PATH_COLUMNS if name in table.columns), None)
    if path_column is None:
        raise _bad_table(file, f"the columns {listed(table.columns)}")
    if "labels" in table.columns:
        class_names, labels = _from_names([text or "" for text in table["labels"]], file)
    else:
        class_names, labels = _from_columns(table.drop(path_column, *(_OTHERS & set(table.columns))), file)
    if not class_names:
        raise _bad_table(file, "no class")
    if split is not None and "split" in table.columns:
        rows = np.flatnonzero(np.array([value == split for value in table["split"]], bool))
        if not len(rows):
            found = sorted({value or "(empty)" for value in table["split"]})
            raise DataError("no image of that split", where=file, expected=f"split {split}", found=listed(found))
    else:
        rows = np.arange(len(table))
    paths = [(table[path_column][row] or "").strip().removeprefix("./") for row in rows.tolist()]
    if "" in paths or not paths:
        raise _bad_table(file, "a row without a path" if paths else "no row")
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise DataError("images that are listed twice", where=file, expected="one row for each", found=listed(twice))
    order = sorted(range(len(paths)), key=lambda place: Path(paths[place]).parts)
    return LabelTable(class_names, tuple(paths[place] for place in order), labels[rows[order]])


def _read(file: Path) -> pl.DataFrame:
    problem = "cannot read the file of labels" if os.path.exists(file) else "no such file of labels"
    return read_csv(file, problem, f"a csv file in UTF-8 with {_FORMAT}", _bad_table)


def read_csv(file: Path, problem: str, expected: str, bad_table: Callable[[Path, str], DataError]) -> pl.DataFrame:
    """The columns of a csv file as text, with their names stripped of spaces.

    Args:
        problem, expected: for the message about a file that cannot be read.
        bad_table: makes the error for a file that is no table, of what was found there.

    Raises:
        DataError: no such file, other bytes than UTF-8, lines of different lengths, or a column twice.
    """
    import polars as pl

    text = read_text(file, problem, limit=_MAX_BYTES, error=DataError, expected=expected)
    try:
        table = pl.read_csv(text.encode(), infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise bad_table(file, str(error).partition("\n")[0]) from error
    names = [name.strip() for name in table.columns]
    # polars gives the second column of a name another one
    renamed = {name for name in names if (base := _SECOND.sub("", name)) != name and base in names}
    if twice := sorted(renamed | {name for name, count in Counter(names).items() if count > 1}):
        raise bad_table(file, f"a column twice: {listed([_SECOND.sub('', name) for name in twice])}")
    return table.rename(dict(zip(table.columns, names, strict=True)))


def _zeros(rows: int, classes: int, file: Path) -> npt.NDArray[np.uint8]:
    if rows * classes > _MAX_LABELS:
        expected = f"at most {_MAX_LABELS:,} labels, images times classes"
        found = f"{rows:,} images and {classes:,} classes"
        raise DataError("the table of labels is too large", where=file, expected=expected, found=found)
    return np.zeros((rows, classes), np.uint8)


def _from_names(cells: Sequence[str], file: Path) -> tuple[tuple[str, ...], npt.NDArray[np.uint8]]:
    separator = ";" if any(";" in cell for cell in cells) else None  # None: any white space
    names = [[name.strip() for name in cell.split(separator) if name.strip()] for cell in cells]
    classes = tuple(sorted({name for row in names for name in row}))
    number = {name: place for place, name in enumerate(classes)}
    labels = _zeros(len(cells), len(classes), file)
    for row, chosen in enumerate(names):
        labels[row, [number[name] for name in chosen]] = 1
    return classes, labels


def _from_columns(table: pl.DataFrame, file: Path) -> tuple[tuple[str, ...], npt.NDArray[np.uint8]]:
    labels = _zeros(len(table), table.width, file)
    for place, name in enumerate(table.columns):
        for row, text in enumerate(table[name]):
            value = _VALUES.get((text or "").strip())
            if value is None:
                raise _bad_table(file, f"{text!r} in column {name}, row {row + 1}")
            labels[row, place] = value
    return tuple(table.columns), labels


def _bad_table(file: Path, found: str) -> DataError:
    return DataError("not a table of labels", where=file, expected=_FORMAT, found=found)
