"""A folder of other images of the same classes as a test split, to measure a distribution shift."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cache_tools.errors import DataError
from cache_tools.images import open_images
from cache_tools.images.check import check_images
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.system.arguments import expand_user


def open_shifted(folder: Path | str, class_names: Sequence[str], image_size: tuple[int, int]) -> ImageSet:
    """Open `folder/CLASS/**/image` with the labels of a student.

    The folders have the names of the student's classes; case, blanks, dashes, underscores and slashes do not matter.
    Classes may be missing.

    Args:
        image_size: (height, width) of the student's canvas, a square.

    Raises:
        DataError: no such folder, a class that the student does not know, two folders of one class, or damaged images.
    """
    folder = expand_user(folder)
    if not folder.is_dir():
        raise DataError("no such folder of shifted test images", where=folder, expected="CLASS/IMAGE below it")
    if image_size[0] != image_size[1]:
        raise DataError("image folders need a square canvas", where=folder, found=f"{image_size}")
    recipe = DatasetRecipe(name="folder", data_dir=folder, test_split=None, image_size=image_size[0])
    images = open_images(recipe.absolute(), "all")
    check_images(images, skip_setting=None)
    known = {_plain(name): label for label, name in enumerate(class_names)}
    unknown = [name for name in images.class_names if _plain(name) not in known]
    if unknown or len(known) < len(class_names):
        raise DataError(
            "the student does not know these classes",
            where=folder,
            expected=f"folders named {', '.join(list(class_names)[:8])}{', …' if len(class_names) > 8 else ''}",
            found=", ".join(unknown[:8]) or "class names that differ in case or punctuation only",
        )
    labels = np.array([known[_plain(name)] for name in images.class_names], np.int64)
    if len(set(labels.tolist())) < len(labels):
        raise DataError("several folders of one class", where=folder, found=", ".join(images.class_names))
    return replace(images, labels=labels[images.labels], class_names=tuple(class_names))


def _plain(name: str) -> str:
    return re.sub(r"[\s_/\\-]+", " ", name).strip().casefold()
