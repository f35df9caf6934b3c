"""Which images to use: the source, its splits and its files; and the identity of an opened split."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cache_tools.config import FIELDS, NAME, ONE, SEVERAL, Changes, Extensible, name_or_fields, one_or_several
from cache_tools.config.fields import Number, PlacePath, Whole
from cache_tools.errors import DataError, MismatchError, RecipeError
from cache_tools.images.class_names import ORDERS, read_names
from cache_tools.images.kinds import source_at
from cache_tools.images.shard_files import is_pattern, shard_place
from cache_tools.images.sources import SOURCES, Normalisation, find_source, has_image_files, takers, takes
from cache_tools.storage import remote_url
from cache_tools.system import named, own_code
from cache_tools.system.arguments import expand_user

# Raise it when the canvas of some image file changes; see pipeline/build/known.py. 2: transparency on a background.
IMAGES_VERSION = 2

Level = Annotated[Whole, Field(ge=0, le=255)]
Colour = tuple[Level, Level, Level]
ValueRange = tuple[Number, Number]
WHITE: Colour = (255, 255, 255)
_COLOURS: dict[str, Colour] = {"white": WHITE, "black": (0, 0, 0)}

ClassOrder = Annotated[
    Annotated[str, Tag(ONE)] | Annotated[tuple[str, ...], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(one_or_several),
    BeforeValidator(partial(read_names, where="dataset.class_order", orders=tuple(ORDERS))),
]


def _known_source(name: str) -> str:
    try:
        find_source(name)
    except ValueError as error:
        raise PydanticCustomError("source", "{problem}", {"problem": str(error)}) from error
    return name


SourceName = Annotated[str, AfterValidator(_known_source)]
TestSplits = Annotated[
    Annotated[str, Tag(ONE)] | Annotated[tuple[str, ...], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(one_or_several),
]
LISTS = frozenset({"csv", "parquet"})
# What a user of a cache may choose anew; everything else determines its targets.
FREE_KEYS = frozenset({"split", "test_split", "data_dir", "download", "on_bad_image", "remote_shards"})


class DatasetRecipe(Extensible):
    """The source of the images.

    Attributes:
        name: the source, of those in `cache_tools.images.sources`; `folder` is any folder of class sub-folders, `hf` a
            Hugging Face data set on the disk (see `cache_tools.images.hf_layout`), `csv` and `parquet` a list of image
            files (see `cache_tools.images.listed`), `webdataset` tar shards (see `cache_tools.images.webdataset`). A
            function of one's own is `package.module:function` (see `cache_tools.images.own_source`).
        split: the split to cache and train on. `train[:20000]`, `train[50%:]` and `train[::5]` are parts of it: Python
            slices of the samples in order. The samples of a folder are sorted by class, so take every k-th.
        test_split: the split to evaluate on, or a part; None for no evaluation. Of several, all are evaluated, and the
            first chooses the best epoch. A split of a folder may be a path of its own.
        data_dir: the folder of the files (`~` allowed); None for the source's usual place. Not needed for digits. Of a
            list the file itself, or the folder of a list per split. Of tar shards also a URL (s3://…, http://…), or a
            pattern such as `train-{000..009}.tar` in either.
        download: whether to download missing files (Fashion-MNIST, CIFAR).
        image_size: side of the square canvas of image files, 224 when None; the other sources have a fixed size.

    These are for image files, wherever they are:
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
        image_column, label_column: the columns of a Hugging Face data set or a list, where several may be meant; of tar
            shards the endings of the files of a sample, or a field of its `.json`.
        remote_shards: whether tar shards of an object store are copied to the cache home, or each image is read there.
    """

    added: ClassVar[frozenset[str]] = frozenset(
        {"class_order", "background", "value_range", "on_bad_image", "sub_folders", "labels"}
        | {"image_column", "label_column", "remote_shards"}
    )

    name: SourceName
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
    remote_shards: Literal["copy", "read"] = "copy"

    @field_serializer("data_dir", when_used="json-unless-none")
    def _with_both_slashes(self, value: Path) -> str:
        return remote_url(value) or str(value)

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
        source = find_source(self.name)
        if self.image_size is not None and source.side is not None:
            raise ValueError(f"image_size is for folders only; {self.name} has its own size, {source.side}")
        for field in sorted(self.added):
            if not takes(self.name, field) and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field} is for {takers(field)} only, not for {self.name}")
        if self.value_range is not None:
            low, high = self.value_range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError("value_range needs two numbers that rise, such as [0, 4095]")
        if source.needs_place and self.data_dir is None:
            raise ValueError(f"{'a folder' if self.name == 'folder' else self.name} needs data_dir: give --data-dir")
        if self.labels is not None and self.sub_folders is not None:
            raise ValueError("sub_folders is for class folders: with labels, the table says what is in an image")
        return self

    @property
    def has_image_files(self) -> bool:
        """Whether the images are files of the user's, of any size."""
        return has_image_files(self.name)

    @property
    def title(self) -> str:
        """What people call these images: the source, or the name of the folder or list."""
        if find_source(self.name).is_named or self.data_dir is None:
            return self.name.rpartition(":")[2]
        place = self.absolute().data_dir
        assert place is not None
        if self.name == "webdataset" and is_pattern(place):
            place = Path(shard_place(place, self.split).folder)
        return (place.stem if self.name in LISTS else place.name) or self.name

    @property
    def test_splits(self) -> tuple[str, ...]:
        """All test splits, the one that chooses the best epoch first; empty for no evaluation."""
        if self.test_split is None:
            return ()
        return (self.test_split,) if isinstance(self.test_split, str) else self.test_split

    @property
    def normalisation(self) -> Normalisation:
        """(mean, std), each per RGB channel, for pixels scaled to [0, 1]."""
        return find_source(self.name).normalisation

    @property
    def background_colour(self) -> Colour:
        """The background as (red, green, blue)."""
        return _COLOURS[self.background] if isinstance(self.background, str) else self.background

    def absolute(self) -> DatasetRecipe:
        """The same recipe with an absolute data_dir, which can be opened from any working directory."""
        if self.data_dir is None or remote_url(self.data_dir):
            return self
        return self.model_copy(update={"data_dir": Path(os.path.abspath(expand_user(self.data_dir)))})

    def located(self, data_dir: Path | None, download: bool = False) -> DatasetRecipe:
        """The same dataset with another `data_dir`, if given, made absolute; `download` can only be switched on.

        The place may hold the same image files in another way than before: as a list, or as a Hugging Face data set.

        Raises:
            RecipeError: a `data_dir` or `download` for a source that has none.
        """
        check_location(self.name, data_dir, download)
        moved = self if data_dir is None else self.at(data_dir)
        return moved.model_copy(update={"download": download or self.download}).absolute()

    def at(self, data_dir: Path) -> DatasetRecipe:
        """The same images at another place, read by the source that its files are for."""
        if not self.has_image_files or own_code.is_own(self.name):
            return self.model_copy(update={"data_dir": data_dir})
        return self.read_by(source_at(data_dir, self.name), data_dir)

    def read_by(self, name: str, data_dir: Path | None) -> DatasetRecipe:
        """The same images, read by another source of image files. Settings that it does not have are left out."""
        fields = type(self).model_fields
        left_out = {field: fields[field].default for field in self.added if not takes(name, field)}
        return self.model_copy(update={**left_out, "name": name, "data_dir": data_dir})


def as_received(
    dataset: DatasetRecipe, where: object, *, data_dir: Path | None = None, name: str | None = None
) -> DatasetRecipe:
    """A dataset that a received cache or run names, as it may be opened: nothing is downloaded because of it.

    Args:
        where: the cache or run, for errors.
        data_dir: the folder of the images that the user names instead.
        name: the source that the user names instead.

    Raises:
        DataError: without `data_dir`, a network share, a folder of the system's own files, or an object store that the
            user has not named.
        RecipeError: a function of somebody's own whose module the user has not named.
    """
    if name is None:
        own_code.require_consent(dataset.name, where, "source of images")
    places = [str(value) for value in (dataset.labels, dataset.split, *dataset.test_splits) if value is not None]
    places += [] if dataset.data_dir is None or data_dir is not None else [str(dataset.data_dir)]
    for place in places:
        if (url := remote_url(place)) is not None and not named.is_named("stores", shard_place(url, "").folder):
            raise DataError(
                "a received file names an object store that you have not named before",
                where=where,
                found=url,
                next_step=f"if you trust it, name it yourself: --data-dir {url}",
            )
        if is_strange_place(place) and url is None:
            raise DataError(
                "a received file names a place where images are not looked for",
                where=where,
                found=place,
                next_step="name the folder of the images yourself: --data-dir",
            )
    return dataset.model_copy(update={"download": False})


def is_strange_place(place: str) -> bool:
    """Whether a path names a network share or a folder of the system's own files."""
    first = (*Path(os.path.normpath(place)).parts[1:], "")[0] if os.path.isabs(place) else ""
    return place.startswith(("\\\\", "//")) or (first in {"proc", "sys", "dev"} and not place.startswith("/dev/shm/"))


def check_location(name: str, data_dir: Path | None, download: bool) -> None:
    """Raise RecipeError for a `data_dir` of a source without files, or a `download` of one that is not downloaded."""
    source = find_source(name)
    if data_dir is not None and source.side is not None and not source.is_downloadable:
        raise RecipeError(
            f"the dataset {name} has no folder of files, so --data-dir is not for it",
            where=data_dir,
            next_step="give a folder of images as the argument in place of the recipe, or set dataset.name=folder",
        )
    if download and not source.is_downloadable:
        raise RecipeError(
            f"the dataset {name} cannot be downloaded",
            where="--download",
            expected=f"one of {', '.join(sorted(name for name, each in SOURCES.items() if each.is_downloadable))}",
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
        changes: the user's settings; splits and places are free, and so is the source that reads the same image files
            at another place. Everything else must be as the cache has it.
        where: the cache, for errors.
        data_dir: the folder of the images, if the user has named it.

    Raises:
        DataError: see `as_received`.
        RecipeError: a bad value.
        MismatchError: a setting that the cache was not built with.
    """
    values = {} if changes is None else changes.values
    other = values["name"] if values.get("name", stored.name) != stored.name else None
    stored = as_received(stored, where, data_dir=data_dir or values.get("data_dir"), name=other)
    if changes is None:
        return stored
    built_from, place = stored.name, None if values.get("data_dir") is None else Path(str(values["data_dir"]))
    check_location(stored.name, place, values.get("download") is True)
    place = place or data_dir
    if other is not None:
        has_place = place is not None or (has_image_files(other) and not find_source(other).needs_place)
        if not (stored.has_image_files and has_image_files(other) and has_place):
            raise _other_setting("name", stored.name, other, where)
        stored = stored.read_by(other, place)
    elif place is not None and "name" not in values:
        stored = stored.at(place)
    # Labels of another source may be numbers, which an order gives names; the names are compared with the cache's.
    anew = find_source(stored.name).settings | {"class_order"} if stored.name != built_from else frozenset[str]()
    changed = changes.apply_to(stored, where="dataset")
    for key in sorted(values.keys() - FREE_KEYS - {"name"} - anew):
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
    logits, not a softmax. `reduced` are the longest side and the JPEG quality with which larger images were packed.
    """

    added: ClassVar[frozenset[str]] = frozenset({"background", "value_range", "multi_label", "reduced"})

    name: str
    split: str
    num_samples: PositiveInt
    image_size: tuple[PositiveInt, PositiveInt]
    class_names: tuple[str, ...]
    content_digest: str
    background: Colour | None = None
    value_range: ValueRange | None = None
    multi_label: bool = False
    reduced: tuple[PositiveInt, PositiveInt] | None = None


def require_one_label(multi_label: bool, what: str, where: object, next_step: str | None = None) -> None:
    """Raise RecipeError for data whose images have any number of labels; `what` is for images with one."""
    if multi_label:
        raise RecipeError(
            f"{what} is for images with one label each",
            where=where,
            found="images with any number of labels (dataset.labels)",
            next_step=next_step,
        )


def default_data_dir() -> Path:
    """The folder of array sources, also for downloads, if there is no data_dir."""
    return expand_user(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "teacher-cache" / "datasets"
