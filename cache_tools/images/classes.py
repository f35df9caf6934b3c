"""Splits side by side: test splits with fewer classes than the training split, and images that are in both."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cache_tools.errors import DataError
from cache_tools.images.class_names import Names, describe, listed
from cache_tools.images.image_set import ImageSet

Images = TypeVar("Images", bound=ImageSet)


def with_classes(images: Images, class_names: Names) -> Images:
    """A test split with the labels of the training classes, which it may lack some of. Names identify the classes.

    Raises:
        DataError: a class that is not one of `class_names` and has images.
    """
    if images.class_names == class_names:
        return images
    number = {name: label for label, name in enumerate(class_names)}
    present = _counts(images) > 0
    unknown = [
        name for name, some in zip(images.class_names, present.tolist(), strict=True) if some and name not in number
    ]
    if unknown:
        raise DataError(
            "the test split has classes that training does not know",
            where=f"{images.name}, split {images.split}",
            expected=f"some of {describe(class_names)}",
            found=listed(unknown),
            next_step="rename or remove their folders in the test split, or name another test_split",
        )
    places = np.array([number.get(name, -1) for name in images.class_names], np.int64)
    if images.multi_label:
        labels = np.zeros((len(images), len(class_names)), np.uint8)
        labels[:, places[places >= 0]] = images.labels[:, places >= 0]
        return replace(images, labels=labels, class_names=class_names)
    return replace(images, labels=places[images.labels], class_names=class_names)


def missing_classes(images: ImageSet) -> Names:
    """The classes that a split has no images of."""
    return tuple(name for name, count in zip(images.class_names, _counts(images).tolist(), strict=True) if not count)


def missing_notes(*tests: ImageSet) -> tuple[str, ...]:
    """A note for each test split that lacks classes, with its name if there are several splits."""
    missing = [(test.split, missing_classes(test)) for test in tests]
    where = [f" in {split}" if len(tests) > 1 else "" for split, _ in missing]
    return tuple(
        f"no test images of: {listed(names)}{place}" for (_, names), place in zip(missing, where, strict=True) if names
    )


def training_notes(images: ImageSet) -> tuple[str, ...]:
    """A note if the training images lack classes of the dataset, as a part of a folder in class order may."""
    missing = missing_classes(images)
    return (f"no training images of: {listed(missing)}",) if missing else ()


def shared_notes(images: ImageSet, *tests: ImageSet) -> tuple[str, ...]:
    """A note for each test split of which images are also training images: accuracies on those prove nothing."""
    known = {key.tobytes() for key in images.keys}
    counts = [(test, sum(key.tobytes() in known for key in test.keys)) for test in tests]
    return tuple(
        f"{count:,} of {len(test):,} images of the test split {test.split} are also training images, so its figures "
        "are too good"
        for test, count in counts
        if count
    )


def _counts(images: ImageSet) -> npt.NDArray[np.int64]:
    """How many images each class has."""
    if images.multi_label:
        return np.asarray(images.labels.sum(axis=0, dtype=np.int64))
    return np.bincount(images.labels, minlength=len(images.class_names))
