"""A folder of class sub-folders as an image source; `cache_tools.images.open_images` opens it.

Opening reads every image once to hash it, and decodes none (`scan.py`). A broken image raises a DataError that names
the file when it is loaded, or before, with all others, when the split is checked (`check.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_tools.errors import DataError
from cache_tools.images.class_names import arrange, listed
from cache_tools.images.decode import PixelRules
from cache_tools.images.encoded import DEFAULT_IMAGE_SIZE, EncodedImages
from cache_tools.images.index import FileColumn, read_image
from cache_tools.images.kinds import source_at
from cache_tools.images.label_table import has_splits, read_label_table
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.images.scan import scan_folder, scan_listed
from cache_tools.images.sources import SOURCES
from cache_tools.system.arguments import expand_user


@dataclass(frozen=True, eq=False, kw_only=True)
class FolderImages(EncodedImages):
    """A split whose images are files.

    Attributes:
        sizes: int32 [N, 2], `header_sizes`.
    """

    files: FileColumn
    sizes: np.ndarray

    def read(self, sample: int) -> bytes:
        return read_image(self.files[sample])

    def source_of(self, sample: int) -> str | bytes:
        return str(self.files[sample])

    def name_of(self, sample: int) -> str:
        return os.path.relpath(self.files[sample], self.summary.root)

    def header_sizes(self) -> np.ndarray:
        return self.sizes

    def place_of(self, sample: int) -> str:
        return str(self.files[sample])

    def _fields_at(self, rows: slice | np.ndarray) -> dict[str, Any]:
        return {"files": self.files[rows], "sizes": self.sizes[rows]}


def open_folder(recipe: DatasetRecipe, split: str) -> FolderImages:
    """Open `data_dir/split/class/**/image`, or `data_dir/class/**/image` without a split folder and test_split.

    Contents decide which files are images, not their endings; hidden ones are left out. Files are sorted by name, and
    classes are in the recipe's `class_order`. Only in the training split does every class folder need an image.

    Raises:
        DataError: the folder is missing, has no classes or (in the training split) an empty one, a class name cannot
            be used, or links form a loop.
    """
    if recipe.labels is not None:
        return _open_labelled(recipe, recipe.labels, split)
    root = _split_folder(recipe, split)
    scan = scan_folder(
        root,
        class_order=recipe.class_order,
        sub_folders=recipe.sub_folders,
        is_training=split == recipe.split.partition("[")[0],
    )
    size = recipe.image_size or DEFAULT_IMAGE_SIZE
    return FolderImages(
        name=recipe.name,
        split=split,
        class_names=scan.class_names,
        labels=scan.labels,
        keys=scan.keys,
        sizes=scan.sizes,
        image_size=(size, size),
        files=scan.files,
        rules=PixelRules(recipe.background_colour, recipe.value_range),
        summary=scan.summary,
    )


def _open_labelled(recipe: DatasetRecipe, file: Path, split: str) -> FolderImages:
    """The images that a csv file lists, wherever they are below the folder of the split; others are left out."""
    assert recipe.data_dir is not None  # validated by the recipe
    data_dir = expand_user(recipe.data_dir)
    own = data_dir / split / expand_user(file)  # an absolute path stays as it is
    table_file = own if own.is_file() else data_dir / expand_user(file)
    root = data_dir / split if (data_dir / split).is_dir() else data_dir
    if recipe.test_split is not None and table_file != data_dir / split / file and not has_splits(table_file):
        raise DataError(
            "a table of labels for two splits that does not tell them apart",
            where=table_file,
            expected="a column `split`",
            next_step=f"add it, or give each split a file of its own ({data_dir}/{split}/{file.name})",
        )
    table = read_label_table(table_file, split)
    if missing := [path for path in table.paths if not (root / path).is_file()]:
        raise DataError(
            f"{len(missing):,} images of a table of labels are missing",
            where=table_file,
            expected=f"files in {root}",
            found=f"no {listed(missing)}",
        )
    order = table.class_names if recipe.class_order == "sorted" else arrange(table.class_names, recipe.class_order)
    places = [table.class_names.index(name) for name in order]
    files, contents, summary = scan_listed(root, table.paths, table_file)
    size = recipe.image_size or DEFAULT_IMAGE_SIZE
    return FolderImages(
        name=recipe.name,
        split=split,
        class_names=order,
        labels=np.ascontiguousarray(table.labels[:, places]),
        keys=contents.keys,
        sizes=contents.sizes,
        image_size=(size, size),
        files=files,
        rules=PixelRules(recipe.background_colour, recipe.value_range),
        summary=summary,
    )


def _split_folder(recipe: DatasetRecipe, split: str) -> Path:
    assert recipe.data_dir is not None  # validated by the recipe
    root = expand_user(recipe.data_dir)
    try:
        str(root / split).encode()
    except UnicodeEncodeError:
        raise DataError(
            "the path of the image folder is not UTF-8, so a cache cannot record it",
            where=str(root / split),
            next_step="rename the folders, or make a link to it with another name",
        ) from None
    if (root / split).is_dir():
        return root / split
    if root.is_dir() and recipe.test_split is None:
        return root
    folders = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    kind = source_at(root, "folder")
    if kind in ("csv", "parquet", "webdataset"):
        raise DataError(
            f"these are {SOURCES[kind].title}, not a folder of class folders",
            where=root,
            expected=f"{root}/{split}/CLASS/IMAGE",
            next_step=f"--set dataset.name={kind} reads them",
        )
    raise DataError(
        "image folder not found",
        where=root / split,
        expected=f"{root}/{split}/CLASS/IMAGE",
        found=f"{root} without a folder {split}, but with {_listed(folders)}" if root.is_dir() else "no such folder",
        next_step=_next_step(recipe, split, folders)
        if root.is_dir()
        else "give the folder of the images with --data-dir, or set dataset.data_dir",
    )


def _next_step(recipe: DatasetRecipe, split: str, folders: list[str]) -> str:
    likely = {"train": ("training", "train"), "test": ("val", "valid", "validation", "testing", "test", "dev")}
    near = [name for name in folders if name.lower() in likely.get(split, (split.lower(),))]
    if near:
        setting = "split" if split == recipe.split else "test_split"
        return f"name it: --set dataset.{setting}={near[0]}"
    if split == recipe.test_split:
        return "set dataset.test_split to one of these folders, or to null to train without a test split"
    return (
        "if these are the class folders: --set dataset.test_split=null trains on all of them; otherwise give their "
        "folder with --data-dir, and the splits with dataset.split and dataset.test_split"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8:,} more" if len(names) > 8 else ""
    return f"the folders {', '.join(names[:8])}{more}" if names else "no folder at all"
