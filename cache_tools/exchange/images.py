"""The images that imported targets are about, and which of them each row of a file is."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.config import Frozen, given_settings, is_recipe_file, parse_yaml, set_dotted, typed_settings, validate
from cache_tools.config.fields import Name
from cache_tools.config.text import MAX_RECIPE_BYTES, read_text
from cache_tools.errors import DataError, RecipeError
from cache_tools.format.recipe import with_canvas
from cache_tools.images.encoded import EncodedImages
from cache_tools.images.image_set import ImageSet
from cache_tools.images.own_folder import VIEW_SIZE, read_own_folder, refuse_second_folder
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.images.sources import SOURCES
from cache_tools.views.recipe import ViewRecipe

SHOWN = 4  # names in a message


class ImportRecipe(Frozen):
    """The images that targets are about, and what their teacher saw of them.

    Attributes:
        name: of the cache.
        views: None for the clean image: of image files the centre that students are tested on.
    """

    name: Name
    dataset: DatasetRecipe
    views: ViewRecipe | None = None

    @property
    def shown(self) -> ViewRecipe:
        """The views of the cache."""
        if self.views is not None:
            return self.views
        if not self.dataset.has_image_files:
            return ViewRecipe()
        size = self.dataset.image_size or VIEW_SIZE
        return ViewRecipe.model_validate({"ops": [{"op": "resize-centre-crop", "size": size}]})

    @property
    def source(self) -> DatasetRecipe:
        """The dataset, on the canvas from which test images of these views are cut."""
        if self.views is None and self.dataset.image_size is not None:
            canvas = self.shown.canvas_side
            return self.dataset if canvas is None else self.dataset.model_copy(update={"image_size": canvas})
        return with_canvas(self.dataset, self.shown)


def read_import_recipe(
    source: str, overrides: Iterable[str] = (), options: Mapping[str, Any] | None = None
) -> ImportRecipe:
    """The recipe of an import.

    Args:
        source: the name of a dataset (`digits`, `cifar100`), a folder of images, or a YAML file with `name`, `dataset`
            and `views`.
        overrides, options: as for `cache_tools.config.load_recipe`.

    Raises:
        RecipeError: no such dataset, unreadable YAML, an unknown key or a bad value.
        DataError: a folder without training images.
    """
    overrides = list(overrides)
    settings = given_settings(overrides, options)
    data: dict[str, Any]
    if source in SOURCES:
        data = {"name": source, "dataset": {"name": source}}
    elif is_recipe_file(source) and not os.path.isdir(source):
        text = read_text(
            Path(source), "cannot read the recipe", limit=MAX_RECIPE_BYTES, expected="a YAML file in UTF-8"
        )
        read = parse_yaml(text, "recipe is not valid YAML", where=source)
        if not isinstance(read, dict):
            raise RecipeError("recipe is not a mapping", where=source, expected="name, dataset and views")
        data = {"name": Path(source).stem, **read}
    elif os.path.isdir(os.path.expanduser(source)):
        refuse_second_folder(source, (key for key, _ in settings))
        folder = read_own_folder(Path(source), settings)
        data = {"name": folder.name, "dataset": {**folder.dataset, "image_size": None}}
    else:
        raise RecipeError(
            "no such dataset",
            where=source,
            expected="a folder of images, a YAML file, or the name of a dataset, such as digits or cifar100",
        )
    for key, value in settings:
        set_dotted(data, key, value)
    return validate(ImportRecipe, data, where=source, typed=typed_settings(overrides, options, {}))


def samples_named(images: ImageSet, names: Sequence[str], where: object) -> npt.NDArray[np.int64]:
    """The sample that each name is, int64.

    Names are paths below the folder of the split, with the name of that folder before them or not, with ending or not;
    or file names alone, where no two images share one. All names of a file have the same form.

    Raises:
        DataError: images without names, or names that are not images of the dataset.
    """
    if not isinstance(images, EncodedImages):
        raise DataError(
            "these images have no file names by which rows could be matched",
            where=f"{images.name}, split {images.split}",
            expected="rows in the order of the images, or their numbers as `index`",
        )
    wanted = [PurePosixPath(name.replace("\\", "/")).as_posix() for name in names]
    own = [images.name_of(sample).replace(os.sep, "/") for sample in range(len(images))]
    folder = f"{os.path.basename(str(images.summary.root))}/"
    best: list[int] = []
    best_form = _FORMS[0]
    for form in _FORMS:
        places = _unique(form(name) for name in own)
        found = [sample for name in wanted if (sample := places.get(form(name.removeprefix(folder)))) is not None]
        if len(found) == len(wanted):
            return np.asarray(found, dtype=np.int64)
        if len(found) > len(best):
            best, best_form = found, form
    places = _unique(best_form(name) for name in own)
    lost = [name for name in wanted if best_form(name.removeprefix(folder)) not in places]
    raise DataError(
        f"{len(lost):,} of {len(wanted):,} names are not images of the dataset",
        where=where,
        expected=f"names such as {own[0]}",
        found=_few(lost),
        next_step="give the dataset that the targets were computed for, such as with --data-dir or --set dataset.split",
    )


def samples_by_key(images: ImageSet, keys: npt.NDArray[np.uint8], where: object) -> npt.NDArray[np.int64]:
    """The sample of each content key, uint8 [N, 16]; of several copies of one image, each is taken once, in order.

    Raises:
        DataError: keys of other images.
    """
    places: dict[bytes, list[int]] = {}
    for sample, key in enumerate(images.keys):
        places.setdefault(key.tobytes(), []).append(sample)
    found, lost = np.empty(len(keys), np.int64), []
    for row, key in enumerate(keys):
        samples = places.get(key.tobytes())
        if not samples:
            lost.append(key.tobytes().hex())
            continue
        found[row] = samples.pop(0)
    if lost:
        raise DataError(
            f"{len(lost):,} of {len(keys):,} content keys are not of images of the dataset",
            where=where,
            expected="keys as `sample_keys` of a cache of these images has them",
            found=_few(lost),
        )
    return found


def samples_numbered(images: ImageSet, numbers: npt.NDArray[Any], where: object) -> npt.NDArray[np.int64]:
    """Numbers of samples, checked; raises DataError for others."""
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        raise DataError(
            "sample numbers are not whole numbers in one row",
            where=where,
            expected="int64 [rows]",
            found=f"{numbers.dtype} {list(numbers.shape)}",
        )
    wrong = (numbers < 0) | (numbers >= len(images))
    if wrong.any():
        raise DataError(
            f"{int(wrong.sum()):,} sample numbers are not of the dataset",
            where=where,
            expected=f"0 to {len(images) - 1:,}",
            found=int(numbers[wrong][0]),
        )
    return numbers.astype(np.int64)


def rows_of_samples(images: ImageSet, samples: npt.NDArray[np.int64], where: object) -> npt.NDArray[np.int64]:
    """The row of every sample, int64 [N], where `samples` has the sample of every row.

    Raises:
        DataError: a sample without a row, or with several.
    """
    rows = np.full(len(images), -1, np.int64)
    rows[samples] = np.arange(len(samples))
    counts = np.bincount(samples, minlength=len(images))
    for problem, chosen in (("no row", counts == 0), ("several rows", counts > 1)):
        if chosen.any():
            raise DataError(
                f"{int(chosen.sum()):,} of {len(images):,} images have {problem}",
                where=where,
                expected="one row for each image of the split",
                found=_few([title_of(images, int(sample)) for sample in np.flatnonzero(chosen)[:SHOWN]], chosen.sum()),
                next_step="complete the file, or choose the images that it has: --set 'dataset.split=train[:1000]'",
            )
    return rows


def title_of(images: ImageSet, sample: int) -> str:
    """An image, for messages."""
    return images.name_of(sample) if isinstance(images, EncodedImages) else f"sample {sample}"


def _few(names: Sequence[str], count: int | None = None) -> str:
    total = len(names) if count is None else int(count)
    more = f" and {total - SHOWN:,} more" if total > SHOWN else ""
    return f"{', '.join(str(name)[:200] for name in names[:SHOWN])}{more}"


def _unique(forms: Iterable[str]) -> dict[str, int]:
    """Form → sample, without forms that several samples share."""
    listed = list(forms)
    counts = Counter(listed)
    return {form: sample for sample, form in enumerate(listed) if counts[form] == 1}


def _without_ending(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix() if PurePosixPath(name).name else name


_FORMS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    _without_ending,
    lambda name: PurePosixPath(name).name,
    lambda name: _without_ending(PurePosixPath(name).name),
)
