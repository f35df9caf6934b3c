"""The sources of images by name: what opens each, and what a recipe may set for it.

A new source is an entry of `SOURCES` and a function `(recipe, split) -> ImageSet`. The function is named here and
imported when a split is opened: reading a recipe imports no reader of images.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from cache_tools.system.own_code import is_own

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]

# Mean and std per RGB channel on [0, 1]. Of image files: those of ImageNet.
_IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Source:
    """A source of images.

    Attributes:
        opener: the function that opens a split of it, as `module:function`.
        title: what messages call data of it.
        normalisation: (mean, std) per RGB channel on [0, 1], over the train split or customary.
        is_named: whether the name says which images they are, wherever they lie.
        side: of the images, if all have one size; None for image files, which are brought to `image_size`.
        needs_place: whether `data_dir` has to be given.
        is_downloadable: whether the files can be downloaded.
        settings: those of the recipe that only some sources have.
    """

    opener: str
    title: str = "folders"
    normalisation: Normalisation = _IMAGENET
    is_named: bool = False
    side: int | None = None
    needs_place: bool = True
    is_downloadable: bool = False
    settings: frozenset[str] = frozenset()


_COLUMNS = frozenset({"image_column", "label_column"})


def _array(function: str, normalisation: Normalisation, *, side: int = 32, is_downloadable: bool = True) -> Source:
    return Source(
        f"cache_tools.images.arrays:{function}",
        normalisation=normalisation,
        is_named=True,
        side=side,
        needs_place=False,
        is_downloadable=is_downloadable,
    )


# Those of torchvision whose images are files; `torchvision_sets.py` reads them.
TORCHVISION_SETS = (
    *("caltech101", "caltech256", "country211", "dtd", "eurosat", "fgvc-aircraft", "flowers102", "food101", "gtsrb"),
    *("imagenette", "oxford-iiit-pet", "rendered-sst2", "stanford-cars", "sun397"),
)
_TORCHVISION = Source(
    "cache_tools.images.torchvision_sets:open_named_set", is_named=True, needs_place=False, is_downloadable=True
)

# Digits, Fashion-MNIST: mean and std over the 32 × 32 canvas, as a test recomputes. CIFAR: the customary figures.
SOURCES: dict[str, Source] = {
    "digits": _array("open_digits", ((0.3058,) * 3, (0.3241,) * 3), is_downloadable=False),
    "fashion-mnist": _array("open_fashion_mnist", ((0.2190,) * 3, (0.3318,) * 3)),
    "cifar10": _array("open_cifar", ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))),
    "cifar100": _array("open_cifar", ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))),
    "stl10": _array("open_stl10", ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)), side=96),
    "svhn": _array("open_svhn", ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))),
    "folder": Source("cache_tools.images.folder:open_folder", settings=frozenset({"sub_folders", "labels"})),
    "hf": Source("cache_tools.images.hf:open_hf", "Hugging Face data sets", settings=_COLUMNS),
    "csv": Source("cache_tools.images.listed:open_listed", "lists of images", settings=_COLUMNS),
    "parquet": Source("cache_tools.images.listed:open_listed", "lists of images", settings=_COLUMNS),
    "webdataset": Source(
        "cache_tools.images.webdataset:open_webdataset", "tar shards", settings=_COLUMNS | {"remote_shards"}
    ),
    **dict.fromkeys(TORCHVISION_SETS, _TORCHVISION),
}
_SOME_SOURCES = frozenset().union(*(source.settings for source in SOURCES.values()))
_OWN = Source(
    "cache_tools.images.own_source:open_own", "sources of your own", needs_place=False, settings=_SOME_SOURCES
)


def find_source(name: str) -> Source:
    """The source of a name.

    Raises:
        ValueError: there is none.
    """
    if name in SOURCES:
        return SOURCES[name]
    if is_own(name):
        return _OWN
    near = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(SOURCES)} and package.module:function"
    raise ValueError(f"no such source of images: {name}; {hint}")


def has_image_files(name: object) -> bool:
    """Whether the images of a source are files of the user's, of any size; False for a name of no source."""
    return isinstance(name, str) and (is_own(name) if name not in SOURCES else SOURCES[name].side is None)


def takes(name: str, setting: str) -> bool:
    """Whether a source of image files has a setting of the recipe."""
    source = find_source(name)
    return source.side is None and (setting not in _SOME_SOURCES or setting in source.settings)


def takers(setting: str) -> str:
    """What the sources that have a setting are called, for messages: `folders`, or `lists of images`."""
    titles = [source.title for source in SOURCES.values() if setting in source.settings]
    *others, last = dict.fromkeys(titles or ["folders"])
    return f"{', '.join(others)} and {last}" if others else last
