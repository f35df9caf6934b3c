"""A list of image files as an image source: a csv or Parquet file of paths and labels.

`cache_tools.images.open_images` opens it. Samples are the rows in order. As of a folder, an index in the cache home
remembers the content keys, so that only new files are read.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cache_tools.config.text import read_bytes
from cache_tools.errors import DataError
from cache_tools.images.class_names import Names, listed
from cache_tools.images.decode import PixelRules
from cache_tools.images.encoded import DEFAULT_IMAGE_SIZE
from cache_tools.images.folder import FolderImages
from cache_tools.images.index import FileColumn, FileState, FoundFiles, examine
from cache_tools.images.label_table import PATH_COLUMNS, read_csv
from cache_tools.images.labels import LABEL_COLUMNS, number_labels
from cache_tools.images.recipe import DatasetRecipe, is_strange_place
from cache_tools.images.summary import FolderSummary, some_names
from cache_tools.system.arguments import expand_user
from cache_tools.units import counted

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import polars as pl

_MAX_BYTES = 1 << 30
_FORMAT = "a column `path`, a column `label` and, for several splits, a column `split`"


def open_listed(recipe: DatasetRecipe, split: str) -> FolderImages:
    """Open the rows of a split: those of the list `data_dir`, or of the list `data_dir/SPLIT.csv` (or `.parquet`).

    A list without a column `split` is one split. Paths are relative to the list.

    Raises:
        DataError: no such list or split, missing columns or values, files that are listed twice, that are missing or
            that hold no image, or a label of no class.
    """
    assert recipe.data_dir is not None  # validated by the recipe
    file = _list_file(recipe, expand_user(recipe.data_dir), split)
    table = _rows(_read(recipe.name, file), recipe, file, split)
    paths = _paths(table["path"], file)
    class_names, labels = number_labels(
        table["label"], recipe.class_order, is_training=split == recipe.split.partition("[")[0], where=file
    )
    return listed_images(recipe, split, file.parent, paths, class_names, labels, list_name=file.name)


def listed_images(
    recipe: DatasetRecipe,
    split: str,
    root: Path,
    paths: list[str],
    class_names: Names,
    labels: npt.NDArray[np.int64],
    *,
    list_name: str,
) -> FolderImages:
    """The images of a list of files, hashed unless the index knows them.

    Args:
        paths: absolute, or relative to `root`.
        labels: int64 [N], places in `class_names`.
        list_name: tells the indexes of several lists in one folder apart, and is named in messages.

    Raises:
        DataError: files that are missing or that hold no image.
    """
    found = FoundFiles(root)
    found.add(paths, _states(root, paths, list_name))
    contents = examine(found, kind=f"list {list_name}")
    if bad := [f"{paths[row]}: {reason}" for row, reason in contents.reasons.items()]:
        count = counted(len(bad), "file") + " of a list that hold no image that can be read"
        raise DataError(count, where=root / list_name, found=some_names(bad), next_step="take them out of the list")
    size = recipe.image_size or DEFAULT_IMAGE_SIZE
    return FolderImages(
        name=recipe.name,
        split=split,
        class_names=class_names,
        labels=labels,
        keys=contents.keys,
        sizes=contents.sizes,
        image_size=(size, size),
        files=FileColumn.of(root, paths),
        rules=PixelRules(recipe.background_colour, recipe.value_range),
        summary=FolderSummary(root, len(paths)),
    )


def _list_file(recipe: DatasetRecipe, place: Path, split: str) -> Path:
    """The file that lists a split; several splits may be in one."""
    if not place.is_dir():
        return place
    ending = f".{recipe.name}"
    file = place / (split if split.endswith(ending) else f"{split}{ending}")
    if file.is_file():
        return file
    found = sorted(path.name for path in place.glob(f"*{ending}"))
    raise DataError(
        "no list of that split",
        where=file,
        found=f"a folder with {listed(found)}" if found else f"a folder without {ending} files",
        next_step=f"set dataset.{_setting(recipe, split)} to the name of a list there, or data_dir to the list itself",
    )


def _setting(recipe: DatasetRecipe, split: str) -> str:
    return "split" if split == recipe.split.partition("[")[0] else "test_split"


def _read(kind: str, file: Path) -> pl.DataFrame:
    """The columns of a list, those of text and numbers as text."""
    problem = "cannot read the list of images" if os.path.exists(file) else "no such list of images"
    if kind == "csv":
        return read_csv(file, problem, f"a csv file in UTF-8 with {_FORMAT}", _bad_list)
    import polars as pl

    expected = f"a Parquet file with {_FORMAT}"
    content = read_bytes(file, problem, limit=_MAX_BYTES, error=DataError, expected=expected)
    try:
        table = pl.read_parquet(io.BytesIO(content))
        texts = {
            name: table[name].cast(pl.String)
            for name, kind in table.schema.items()
            if kind.is_integer() or kind in (pl.String, pl.Categorical, pl.Enum)
        }
        if "path" in table.columns and "path" not in texts:
            raise _bad_list(file, f"a column path of {table.schema['path']}")
        return pl.DataFrame(texts)
    except pl.exceptions.PolarsError as error:
        raise DataError(problem, where=file, expected=expected, found=str(error).partition("\n")[0]) from error


def _rows(table: pl.DataFrame, recipe: DatasetRecipe, file: Path, split: str) -> pl.DataFrame:
    """The rows of a split, as the columns `path` and `label`, stripped of spaces."""
    import polars as pl

    path = _column(table, recipe.image_column, PATH_COLUMNS, "image_column", file)
    label = _column(table, recipe.label_column, LABEL_COLUMNS, "label_column", file)
    chosen = table.select(
        pl.col(path).str.strip_chars().alias("path"), pl.col(label).str.strip_chars().alias("label")
    ).with_row_index("row", offset=1)
    if "split" in table.columns:
        splits = table["split"].str.strip_chars()
        chosen = chosen.filter(splits == split)
        if not len(chosen):
            raise DataError(
                "no image of that split",
                where=file,
                expected=f"split {split}",
                found=listed(sorted({value or "(empty)" for value in splits.unique()})),
                next_step=f"set dataset.{_setting(recipe, split)} to one of them"
                + ("" if _setting(recipe, split) == "split" else ", to a part such as train[80%:], or to null"),
            )
    elif recipe.test_splits and expand_user(str(recipe.data_dir)) == file:
        raise DataError(
            "a list without a column split is one split",
            where=file,
            expected=f"a column split with {recipe.split} and {', '.join(recipe.test_splits)}",
            found=listed(table.columns),
            next_step="set dataset.test_split=null, or dataset.data_dir to a folder with a list per split",
        )
    if not len(chosen):
        raise _bad_list(file, "no row")
    for column in ("path", "label"):
        empty = chosen.filter(pl.col(column).is_null() | (pl.col(column) == ""))
        if len(empty):
            raise _bad_list(file, f"{counted(len(empty), 'row')} without a {column}, such as row {empty['row'][0]}")
    return chosen


def _column(table: pl.DataFrame, chosen: str | None, usual: tuple[str, ...], setting: str, file: Path) -> str:
    found = [name for name in ([chosen] if chosen is not None else usual) if name in table.columns]
    if found:
        return found[0]
    what = f"no column {chosen}" if chosen is not None else f"no column {usual[0]}"
    raise DataError(
        f"{what} in the list of images",
        where=file,
        expected=_FORMAT if chosen is None else None,
        found=f"the columns {listed(table.columns)}",
        next_step=f"name it with --set dataset.{setting}=…",
    )


def _paths(column: pl.Series, file: Path) -> list[str]:
    """The paths of a list, of which none is there twice or is no place of images."""
    paths: list[str] = [os.path.normpath(path) for path in column.to_list()]
    if len(set(paths)) < len(paths):
        seen: set[str] = set()
        twice = [path for path in paths if path in seen or seen.add(path)]  # type: ignore[func-returns-value]
        found = some_names(list(dict.fromkeys(twice)))
        raise DataError("images that are listed twice", where=file, expected="one row for each", found=found)
    elsewhere = [path for path in paths if path.startswith(("/", "\\", ".."))]
    if strange := [path for path in elsewhere if is_strange_place(os.path.normpath(file.absolute().parent / path))]:
        raise DataError("a list names a place where images are not looked for", where=file, found=some_names(strange))
    return paths


def _states(root: Path, paths: list[str], list_name: str) -> list[FileState]:
    prefix = os.path.join(root, "")
    states, missing = [], []
    for path in paths:
        try:
            states.append(FileState.of(os.stat(os.path.join(prefix, path))))
        except (OSError, ValueError):
            missing.append(path)
    if missing:
        raise DataError(
            f"{counted(len(missing), 'image')} of a list {'is' if len(missing) == 1 else 'are'} missing",
            where=root / list_name,
            expected=f"files, by their paths from {root}",
            found=f"no {some_names(missing)}",
            next_step="correct the paths, or move the list to the folder that they begin in",
        )
    return states


def _bad_list(file: Path, found: str) -> DataError:
    return DataError("not a list of images", where=file, expected=_FORMAT, found=found)
