"""Which images to use: the source, its splits and its files; and the identity of an opened split."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, PositiveInt, Tag, field_validator, model_validator

from cache_tools.config import FIELDS, NAME, ONE, SEVERAL, Changes, Extensible, name_or_fields, one_or_several
from cache_tools.config.fields import Number, PlacePath, Whole
from cache_tools.errors import DataError, MismatchError, RecipeError
from cache_tools.images.class_names import ORDERS, read_names
from cache_tools.system.arguments import expand_user

# Raise it when the canvas of some image file changes; see pipeline/build/known.py. 2: transparency on a background.
IMAGES_VERSION = 2

Level = Annotated[Whole, Field(ge=0, le=255)]
Colour = tuple[Level, Level, Level]
ValueRange = tuple[Number, Number]
WHITE: Colour = (255, 255, 255)
_COLOURS: dict[str, Colour] = {"white": WHITE, "black": (0, 0, 0)}

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]

# Mean and std per RGB channel on [0, 1], over the train split. Digits, Fashion-MNIST: over the 32 × 32 canvas,
# as a test recomputes. CIFAR: the customary figures. Image files: those of ImageNet.
_NORMALISATION: dict[str, Normalisation] = {
    "digits": ((0.3058,) * 3, (0.3241,) * 3),
    "fashion-mnist": ((0.2190,) * 3, (0.3318,) * 3),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "hf": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

SOURCE_NAMES = frozenset(_NORMALISATION)


ClassOrder = Annotated[
    Annotated[str, Tag(ONE)] | Annotated[tuple[str, ...], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(one_or_several),
    BeforeValidator(partial(read_names, where="dataset.class_order", orders=tuple(ORDERS))),
]

# The sources of image files in a folder of the user's.
IMAGE_FILES = frozenset({"folder", "hf"})
# The sources that can be downloaded.
_DOWNLOADABLE = frozenset({"fashion-mnist", "cifar10", "cifar100"})
# Settings for one of these sources only.
_FOR_ONE_SOURCE = {"sub_folders": "folder", "labels": "folder", "image_column": "hf", "label_column": "hf"}

TestSplits = Annotated[
    Annotated[str, Tag(ONE)] | Annotated[tuple[str, ...], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(one_or_several),
]
# What a user of a cache may choose anew; everything else determines its targets.
FREE_KEYS = frozenset({"split", "test_split", "data_dir", "download", "on_bad_image"})


class DatasetRecipe(Extensible):
    """The source of the images.

    Attributes:
        name: the source; `folder` is any folder of class sub-folders, `hf` a Hugging Face data set on the disk (see
            `cache_tools.images.hf_layout`).
        split: the split to cache and train on. `train[:20000]`, `train[50%:]` and `train[::5]` are parts of it: Python
            slices of the samples in order. The samples of a folder are sorted by class, so take every k-th.
        test_split: the split to evaluate on, or a part; None for no evaluation. Of several, all are evaluated, and the
            first chooses the best epoch. A split of a folder may be a path of its own.
        data_dir: the folder of the files (`~` allowed); None for the source's usual place. Not needed for digits.
        download: whether to download missing files (Fashion-MNIST, CIFAR).
        image_size: side of the square canvas of image files, 224 when None; the other sources have a fixed size.

    These are for image files, in a folder or a Hugging Face data set:
        class_order: the order of the classes, which numbers the labels: `sorted` by code points, `natural` (2 before
            10, as timm sorts), `case-blind`, `reversed`, or the names themselves. A file with one name per line is read
            when the recipe is loaded. `sorted` leaves the classes of a Hugging Face data set as it numbers them.
        background: the colour behind transparent pixels: `white`, `black` or [red, green, blue].
        value_range: [black, white], the values of images with more than eight bits per pixel that become 0 and 255;
            None for the range that the files declare.
        on_bad_image: what to do about images that cannot be decoded: `error` lists all of them, `skip` leaves them out.
        sub_folders: of class folders: `merge` takes their images for the class, `classes` makes each folder that holds
            images a class of its own. None merges, and asks where they look like classes.
        labels: a csv file of the images' labels, of which each may then have several or none; relative to the folder of
            the split or else to data_dir. `cache_tools.images.label_table` describes it.
        image_column, label_column: the columns of a Hugging Face data set, where several may be meant.
    """

    added: ClassVar[frozenset[str]] = frozenset(
        {"class_order", "background", "value_range", "on_bad_image", "sub_folders", "labels"}
        | {"image_column", "label_column"}
    )

    name: Literal["digits", "fashion-mnist", "cifar10", "cifar100", "folder", "hf"]
    split: str = "train"
    test_split: TestSplits | None = "test"
    data_dir: PlacePath | None = None
    download: bool = False
    image_size: Annotated[Whole, Field(ge=8, le=4096)] | None = None
    class_order: ClassOrder = "sorted"
    background: Annotated[
        Annotated[Literal["white", "black"], Tag(NAME)] | Annotated[Colour, Tag(FIELDS)], Discriminator(name_or_fields)
    ] = "white"
    value_range: ValueRange | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    sub_folders: Literal["merge", "classes"] | None = None
    labels: PlacePath | None = None
    image_column: str | None = None
    label_column: str | None = None

    @field_validator("test_split")
    @classmethod
    def _test_splits_differ(cls, value: TestSplits | None) -> TestSplits | None:
        if isinstance(value, tuple):
            if len(set(value)) < len(value):
                raise ValueError("a test split is named twice")
            return value[0] if len(value) == 1 else value
        return value

    @model_validator(mode="after")
    def _only_folders_choose_a_size(self) -> DatasetRecipe:
        if not self.has_image_files and self.image_size is not None:
            raise ValueError(f"image_size is for folders only; {self.name} has its own size, 32")
        for field in sorted(self.added):
            source = _FOR_ONE_SOURCE.get(field, self.name if self.has_image_files else "folder")
            if self.name != source and getattr(self, field) != type(self).model_fields[field].default:
                only = "Hugging Face data sets" if source == "hf" else "folders"
                raise ValueError(f"{field} is for {only} only, not for {self.name}")
        if self.value_range is not None:
            low, high = self.value_range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError("value_range needs two numbers that rise, such as [0, 4095]")
        if self.has_image_files and self.data_dir is None:
            raise ValueError("a folder needs data_dir" if self.name == "folder" else f"{self.name} needs data_dir")
        if self.labels is not None and self.sub_folders is not None:
            raise ValueError("sub_folders is for class folders: with labels, the table says what is in an image")
        return self

    @property
    def has_image_files(self) -> bool:
        """Whether the images are files of the user's, of any size."""
        return self.name in IMAGE_FILES

    @property
    def title(self) -> str:
        """What people call these images: the source, or the name of the folder."""
        if not self.has_image_files or self.data_dir is None:
            return self.name
        return self.absolute().data_dir.name or self.name  # type: ignore[union-attr]

    @property
    def test_splits(self) -> tuple[str, ...]:
        """All test splits, the one that chooses the best epoch first; empty for no evaluation."""
        if self.test_split is None:
            return ()
        return (self.test_split,) if isinstance(self.test_split, str) else self.test_split

    @property
    def normalisation(self) -> Normalisation:
        """(mean, std), each per RGB channel, for pixels scaled to [0, 1]."""
        return _NORMALISATION[self.name]

    @property
    def background_colour(self) -> Colour:
        """The background as (red, green, blue)."""
        return _COLOURS[self.background] if isinstance(self.background, str) else self.background

    def absolute(self) -> DatasetRecipe:
        """The same recipe with an absolute data_dir, which can be opened from any working directory."""
        if self.data_dir is None:
            return self
        return self.model_copy(update={"data_dir": Path(os.path.abspath(expand_user(self.data_dir)))})

    def located(self, data_dir: Path | None, download: bool = False) -> DatasetRecipe:
        """The same dataset with another `data_dir`, if given, made absolute; `download` can only be switched on.

        Raises:
            RecipeError: a `data_dir` or `download` for a source that has none.
        """
        check_location(self.name, data_dir, download)
        changes = {"data_dir": data_dir or self.data_dir, "download": download or self.download}
        return self.model_copy(update=changes).absolute()


def as_received(dataset: DatasetRecipe, where: object, *, data_dir: Path | None = None) -> DatasetRecipe:
    """A dataset that a received cache or run names, as it may be opened: nothing is downloaded because of it.

    Args:
        where: the cache or run, for errors.
        data_dir: the folder of the images that the user names instead.

    Raises:
        DataError: without `data_dir`, a network share or a folder of the system's own files.
    """
    places = [str(value) for value in (dataset.labels, dataset.split, *dataset.test_splits) if value is not None]
    places += [] if dataset.data_dir is None or data_dir is not None else [str(dataset.data_dir)]
    for place in places:
        first = (*Path(os.path.normpath(place)).parts[1:], "")[0] if os.path.isabs(place) else ""
        if place.startswith(("\\\\", "//")) or (first in {"proc", "sys", "dev"} and not place.startswith("/dev/shm/")):
            raise DataError(
                "a received file names a place where images are not looked for",
                where=where,
                found=place,
                next_step="name the folder of the images yourself: --data-dir",
            )
    return dataset.model_copy(update={"download": False})


def check_location(name: str, data_dir: Path | None, download: bool) -> None:
    """Raise RecipeError for a `data_dir` of a source without files, or a `download` of one that is not downloaded."""
    if data_dir is not None and name not in _DOWNLOADABLE | IMAGE_FILES:
        raise RecipeError(
            f"the dataset {name} has no folder of files, so no data_dir can be set",
            where=data_dir,
            next_step="give a folder of images as the argument in place of the recipe, or set dataset.name=folder",
        )
    if download and name not in _DOWNLOADABLE:
        raise RecipeError(
            f"the dataset {name} cannot be downloaded",
            where="--download",
            expected=f"one of {', '.join(sorted(_DOWNLOADABLE))}",
            next_step="leave --download out"
            if name != "hf"
            else "leave --download out, and fetch it with datasets.load_dataset(NAME).save_to_disk(FOLDER)",
        )


def changed_dataset(
    stored: DatasetRecipe,
    identity: DatasetIdentity,
    changes: Changes | None,
    *,
    where: object,
    data_dir: Path | None = None,
) -> DatasetRecipe:
    """The dataset of a cache as a user of it wants to open it.

    Args:
        stored: of the cache.
        changes: the user's settings; splits and places are free, everything else must be as the cache has it.
        where: the cache, for errors.
        data_dir: the folder of the images, if the user has named it.

    Raises:
        DataError: see `as_received`.
        RecipeError: a bad value.
        MismatchError: a setting that the cache was not built with.
    """
    values = {} if changes is None else changes.values
    stored = as_received(stored, where, data_dir=data_dir or values.get("data_dir"))
    if changes is None:
        return stored
    if values.get("name", stored.name) != stored.name:
        raise _other_setting("name", stored.name, values["name"], where)
    place = values.get("data_dir")
    check_location(stored.name, None if place is None else Path(str(place)), values.get("download") is True)
    changed = changes.apply_to(stored, where="dataset")
    for key in sorted(values.keys() - FREE_KEYS):
        wanted, found = getattr(changed, key), getattr(stored, key)
        if key == "image_size":
            found = identity.image_size[0]
        if wanted not in (found, getattr(stored, key)):
            raise _other_setting(key, found, wanted, where)
    return changed


def _other_setting(key: str, expected: object, found: object, where: object) -> MismatchError:
    return MismatchError(
        f"the cache was built with another dataset.{key}",
        where=where,
        expected=expected,
        found=found,
        next_step=f"leave dataset.{key} out, or build a cache with it",
    )


class DatasetIdentity(Extensible):
    """Identifies samples, their order, their labels and how their files become pixels.

    `content_digest` covers keys, labels and class names. `background` is None for white, and `value_range` None for the
    range that the files declare. With `multi_label` an image may have any number of labels, and a sigmoid reads its
    logits, not a softmax.
    """

    added: ClassVar[frozenset[str]] = frozenset({"background", "value_range", "multi_label"})

    name: str
    split: str
    num_samples: PositiveInt
    image_size: tuple[PositiveInt, PositiveInt]
    class_names: tuple[str, ...]
    content_digest: str
    background: Colour | None = None
    value_range: ValueRange | None = None
    multi_label: bool = False


def require_one_label(multi_label: bool, what: str, where: object) -> None:
    """Raise RecipeError for data whose images have any number of labels; `what` is for images with one."""
    if multi_label:
        raise RecipeError(
            f"{what} is for images with one label each",
            where=where,
            found="images with any number of labels (dataset.labels)",
        )


def default_data_dir() -> Path:
    """The folder of array sources, also for downloads, if there is no data_dir."""
    return expand_user(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "teacher-cache" / "datasets"
