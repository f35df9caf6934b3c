"""A folder of images as the argument of a command: which splits it has, found by the names of its sub-folders."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cache_tools.errors import DataError, RecipeError
from cache_tools.images.hf_layout import find_hf_files, hf_marker
from cache_tools.images.result_folders import result_folder_kind
from cache_tools.images.shard_files import has_shards, local_shards, split_of
from cache_tools.system.arguments import expand_user

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")

# Cut at random places from a canvas that is a seventh larger, as is usual for photographs.
CANVAS_SIZE, VIEW_SIZE = 256, 224


class OwnFolder(NamedTuple):
    """A folder of images as settings of a recipe, as plain data.

    Attributes:
        name: a name for a recipe, after the folder's.
        note: which splits were found, for the screen.
    """

    name: str
    dataset: dict[str, Any]
    views: dict[str, Any]
    note: str


def is_folder_argument(source: str, recipe_names: Collection[str]) -> bool:
    """Whether an argument names an existing folder. The name of a recipe does not, but `./digits` and `digits/` do."""
    return source not in recipe_names and os.path.isdir(os.path.expanduser(source))


def refuse_second_folder(source: str, given: Iterable[str]) -> None:
    """Raise RecipeError if a folder is the argument of a command and its options name a folder too.

    Args:
        given: dotted keys of the settings in the command.
    """
    if twice := {"data_dir", "dataset.data_dir"}.intersection(given):
        raise RecipeError(
            "the folder of the images is given twice",
            where=source,
            expected="a folder as the argument, or a recipe and --data-dir",
            found=", ".join(sorted(twice)),
        )


def read_own_folder(path: Path, settings: Iterable[tuple[str, Any]] = ()) -> OwnFolder:
    """The settings for a folder of images.

    A Hugging Face data set and tar shards have splits of their own. Otherwise images to train on are in its sub-folder
    `train` (or `training`), images to test on in the first of `test`, `testing`, `val`, `valid` and `validation`.
    Without any of these, its sub-folders are the classes.

    Args:
        settings: dotted key → value of the user's own settings. `dataset.image_size` scales the views too.

    Raises:
        RecipeError: the folder is a cache or a run.
        DataError: it has test images only.
    """
    path = expand_user(path)
    _refuse_other_kinds(path)
    if has_shards(path):
        return _read_shards(path, settings)
    if hf_marker(path) is not None:
        return _read_hf_folder(path, settings)
    train = next((name for name in TRAIN_NAMES if (path / name).is_dir()), None)
    test = next((name for name in TEST_NAMES if (path / name).is_dir()), None)
    if train is None and test is not None:
        raise DataError(
            "this folder has test images and no training images",
            where=path,
            expected=f"a folder {path / 'train'} with a folder per class",
            found=f"a folder {test}",
            next_step="name the split in a recipe file: dataset: {name: folder, data_dir: …, split: …}",
        )
    dataset = {
        "name": "folder",
        "data_dir": str(path),
        "split": train or "train",
        "test_split": test,
        "image_size": CANVAS_SIZE,
    }
    note = f"{path}: training images in {train or 'its class folders'}, "
    note += f"test images in {test}" if test else "no test images (no folder test or val), so nothing is evaluated"
    return OwnFolder(_plain_name(path), dataset, _views(dict(settings).get("dataset.image_size")), note)


def _read_shards(path: Path, settings: Iterable[tuple[str, Any]]) -> OwnFolder:
    """The settings for a folder of tar shards."""
    splits = sorted({split_of(name) for name in local_shards(path)})
    return _read_splits(path, splits, "webdataset", "tar shards", settings)


def _read_hf_folder(path: Path, settings: Iterable[tuple[str, Any]]) -> OwnFolder:
    """The settings for a Hugging Face data set."""
    return _read_splits(path, list(find_hf_files(path).splits), "hf", "a Hugging Face data set", settings)


def _read_splits(
    path: Path, splits: Sequence[str], name: str, title: str, settings: Iterable[tuple[str, Any]]
) -> OwnFolder:
    """The settings for data with splits that have names."""
    train = next((name for name in TRAIN_NAMES if name in splits), None)
    if train is None and len(splits) == 1:
        train = next(iter(splits))
    test = next((name for name in TEST_NAMES if name in splits and name != train), None)
    values = dict(settings)
    if train is None and "dataset.split" not in values:
        raise DataError(
            "this data set has no split `train`",
            where=path,
            found=f"the splits {', '.join(splits)}",
            next_step=f"choose one: --set dataset.split={next(iter(splits))}",
        )
    dataset = {
        "name": name,
        "data_dir": str(path),
        "split": train or "train",
        "test_split": test,
        "image_size": CANVAS_SIZE,
    }
    test = values.get("dataset.test_split", test)
    note = f"{path}: {title}, training images in {values.get('dataset.split', train)}, "
    note += (
        f"test images in {test}" if test else "no test images (no split test or validation), so nothing is evaluated"
    )
    return OwnFolder(_plain_name(path), dataset, _views(values.get("dataset.image_size")), note)


def _views(image_size: Any) -> dict[str, Any]:
    """Crops of 224 pixels from the usual canvas, and in proportion from another; a bad size is refused elsewhere."""
    size = image_size * VIEW_SIZE // CANVAS_SIZE if isinstance(image_size, int) and image_size >= 8 else VIEW_SIZE
    return {"ops": [{"op": "random-resized-crop", "size": size, "scale": [0.25, 1.0]}, {"op": "flip"}]}


def _plain_name(path: Path) -> str:
    """The name of a folder as the name of a recipe."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.absolute().resolve().name).lstrip("._-")
    return name or "images"


def _refuse_other_kinds(path: Path) -> None:
    if (path / "zarr.json").is_file():
        raise RecipeError(
            "this folder is a cache and no folder of images",
            where=path,
            next_step=f"train from it with train-student --cache {path}",
        )
    if (path / "run.json").is_file():
        raise RecipeError(
            "this folder is a run of train-student and no folder of images",
            where=path,
            next_step=f"repeat the run with train-student {path / 'recipe.yaml'}, or use it as a teacher with "
            f"build-cache --teacher {path}",
        )
    if (path / "sweep.yaml").is_file():
        raise RecipeError(
            "this folder is a sweep of sweep-students and no folder of images",
            where=path,
            next_step=f"read its results with report-students {path}, or name one of its runs, {path / 'trials'}/…",
        )
    if (kind := result_folder_kind(os.listdir(path))) is not None:
        raise RecipeError(f"this folder is an {kind} and no folder of images", where=path)
