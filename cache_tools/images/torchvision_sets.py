"""The named data sets of torchvision whose images are files, in the folders that torchvision makes of them.

torchvision reads the layout; the images are then files like any others: hashed, indexed and decoded by us.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cache_tools.errors import DataError
from cache_tools.images.class_names import Names, arrange, listed
from cache_tools.images.folder import FolderImages
from cache_tools.images.listed import listed_images
from cache_tools.images.recipe import DatasetRecipe, default_data_dir
from cache_tools.system.arguments import expand_user

Files = tuple[list[Any], list[Any]]


class NamedSet(NamedTuple):
    """A data set of torchvision.

    Attributes:
        class_name: in `torchvision.datasets`.
        splits: our name → torchvision's; empty for a set of one split, `train`.
        files: the paths and labels of an opened set.
    """

    class_name: str
    splits: dict[str, str]
    files: Callable[[Any], Files]


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _image_files(found: Any) -> Files:
    return found._image_files, found._labels


def _samples(found: Any) -> Files:
    samples = found._samples if hasattr(found, "_samples") else found.samples
    return [path for path, _ in samples], [label for _, label in samples]


def _pets(found: Any) -> Files:
    return found._images, found._labels


def _caltech101(found: Any) -> Files:
    names = [
        f"{found.categories[label]}/image_{number:04}.jpg" for label, number in zip(found.y, found.index, strict=True)
    ]
    return [os.path.join(found.root, "101_ObjectCategories", name) for name in names], found.y


def _caltech256(found: Any) -> Files:
    names = [
        f"{found.categories[label]}/{label + 1:03}_{number:04}.jpg"
        for label, number in zip(found.y, found.index, strict=True)
    ]
    return [os.path.join(found.root, "256_ObjectCategories", name) for name in names], found.y


def _sun397(found: Any) -> Files:
    """In the order of their paths: torchvision has them as the file system lists them."""
    pairs = sorted(zip(map(str, found._image_files), found._labels, strict=True))
    return [path for path, _ in pairs], [label for _, label in pairs]


SETS: dict[str, NamedSet] = {
    "caltech101": NamedSet("Caltech101", {}, _caltech101),
    "caltech256": NamedSet("Caltech256", {}, _caltech256),
    "country211": NamedSet("Country211", _same("train", "valid", "test"), _samples),
    "dtd": NamedSet("DTD", _same("train", "val", "test"), _image_files),
    "eurosat": NamedSet("EuroSAT", {}, _samples),
    "fgvc-aircraft": NamedSet("FGVCAircraft", _same("train", "val", "trainval", "test"), _image_files),
    "flowers102": NamedSet("Flowers102", _same("train", "val", "test"), _image_files),
    "food101": NamedSet("Food101", _same("train", "test"), _image_files),
    "gtsrb": NamedSet("GTSRB", _same("train", "test"), _samples),
    "imagenette": NamedSet("Imagenette", {"train": "train", "val": "val", "test": "val"}, _samples),
    "oxford-iiit-pet": NamedSet("OxfordIIITPet", {"train": "trainval", "test": "test"}, _pets),
    "rendered-sst2": NamedSet("RenderedSST2", _same("train", "val", "test"), _samples),
    "stanford-cars": NamedSet("StanfordCars", _same("train", "test"), _samples),
    "sun397": NamedSet("SUN397", {}, _sun397),
}


def open_named_set(recipe: DatasetRecipe, split: str) -> FolderImages:
    """Open a split of a data set below `data_dir`, which is the folder that torchvision calls `root`.

    Raises:
        DataError: no such split, no such data set in the folder, or images that are missing.
    """
    one = SETS[recipe.name]
    splits = one.splits or _same("train")
    if split not in splits:
        raise DataError(
            f"{recipe.name} has no such split",
            where=split,
            expected=f"{', '.join(splits)}, or a part such as train[::5]",
            next_step=None if one.splits else "set dataset.test_split=null, or to such a part",
        )
    root = default_data_dir() if recipe.data_dir is None else expand_user(recipe.data_dir)
    found = _open(recipe, one, root, {"split": splits[split]} if one.splits else {})
    files, numbers = one.files(found)
    class_names = _class_names(recipe.name, found, numbers)
    order = class_names if recipe.class_order == "sorted" else arrange(class_names, recipe.class_order)
    place = np.array([order.index(name) for name in class_names], np.int64)
    paths = [os.path.relpath(path, root) for path in files]
    labels = place[np.array(numbers, np.int64)]
    return listed_images(recipe, split, root, paths, order, labels, list_name=f"{recipe.name}, split {split}")


def _open(recipe: DatasetRecipe, one: NamedSet, root: Path, settings: dict[str, str]) -> Any:
    from torchvision import datasets

    cls = getattr(datasets, one.class_name)
    if recipe.name == "imagenette":
        sizes = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}
        settings = settings | {"size": next((size for size, name in sizes.items() if (root / name).is_dir()), "full")}
    if recipe.name.startswith("caltech") and not (root / recipe.name).is_dir() and not recipe.download:
        raise _not_found(recipe, root, "no such folder")  # torchvision would make it
    try:
        with redirect_stdout(StringIO()):
            return cls(root, download=recipe.download, **settings)
    except Exception as error:  # of the layout in its many forms: files that are missing, cut or changed
        text = str(error).replace("You can use download=True to download it", "").strip(" .")
        raise _not_found(recipe, root, text or type(error).__name__) from error


def _not_found(recipe: DatasetRecipe, root: Path, found: str) -> DataError:
    return DataError(
        f"{recipe.name} not found, or damaged",
        where=root,
        expected="the folder that torchvision calls root, with its files unpacked",
        found=found,
        next_step="give that folder with --data-dir, or add --download",
    )


def _class_names(name: str, found: Any, numbers: list[Any]) -> Names:
    names = getattr(found, "classes", None) or getattr(found, "categories", None)
    if names is None:  # signs of GTSRB have numbers only
        names = [str(number) for number in range(max(numbers) + 1)]
    names = [each[0] if isinstance(each, tuple) else str(each) for each in names]
    if name == "caltech256":
        names = [each.partition(".")[2] or each for each in names]
    if len(set(names)) < len(names):
        raise DataError("class names that are there twice", where=name, found=listed(sorted(names)))
    return tuple(names)
