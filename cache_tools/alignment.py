"""Check before training that samples and pixels are those that the cache was built from."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from cache_tools.errors import MismatchError
from cache_tools.format.manifest import Canary
from cache_tools.images.formats import FIRST_EXTENSIONS
from cache_tools.views.recipe import ViewRecipe

if TYPE_CHECKING:
    import torch

    from cache_tools.format.manifest import Manifest
    from cache_tools.format.recipe import CacheRecipe
    from cache_tools.images.image_set import ImageSet
    from cache_tools.images.recipe import DatasetIdentity

MAX_CANARIES = 16


class CachedSamples(Protocol):
    """The part of `TeacherCache` that the checks need."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def recipe(self) -> CacheRecipe: ...

    @property
    def num_samples(self) -> int: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def labels(self) -> npt.NDArray[np.int64]: ...

    @property
    def sample_keys(self) -> npt.NDArray[np.uint8]: ...


def check_dataset(cache: CachedSamples, images: ImageSet) -> None:
    """Compare a split with the one the cache was built from: class names, samples, canvas, contents, labels, order.

    Raises:
        MismatchError: names the first difference.
    """
    built_from, given = cache.recipe.dataset, images.identity()
    if built_from.content_digest == given.content_digest and _pixels_of(built_from) == _pixels_of(given):
        return
    difference = _difference(cache, images) or ("its digest", built_from.content_digest, given.content_digest)
    what, expected, found = difference
    raise MismatchError(
        f"this dataset is not the one the cache was built from: {what}",
        where=f"{images.name}, split {images.split}",
        expected=expected,
        found=found,
        next_step=f"use the images of {built_from.name}, split {built_from.split}, that the cache was built from, "
        f"or build a cache of these{_endings_note(cache, images)}",
    )


def aligned(cache: CachedSamples, images: ImageSet) -> ImageSet:
    """Put the samples of a split into the order of the cache. Content keys identify them, so files may be renamed.

    Labels move with their images. Copies of one image are told apart by their labels.

    Returns:
        `images` itself if it is already in the order of the cache.

    Raises:
        MismatchError: other images, labels, classes or canvas; names the first difference.
    """
    if cache.recipe.dataset.content_digest != images.content_digest and cache.class_names == images.class_names:
        rows = _matching_rows(cache, images)
        images = images if rows is None else images.subset(rows)
    check_dataset(cache, images)
    return images


def check_canaries(cache: CachedSamples, images: ImageSet) -> None:
    """Make a few views again and compare their pixels with those that the teachers saw.

    Raises:
        MismatchError: view code or image decoding has changed; names the first view and sample.
    """
    for canary in cache.manifest.canaries:
        found = _canary(cache.recipe.views, images, canary.view, canary.index).pixel_digest
        if found != canary.pixel_digest:
            raise MismatchError(
                "these are not the pixels that the teachers saw",
                where=f"view {canary.view} of sample {canary.index}",
                expected=f"pixel digest {canary.pixel_digest}",
                found=found,
                next_step="install the versions of teacher-cache and of the image libraries that `cache-tools info` "
                "shows, or build the cache again",
            )


def make_canaries(views: ViewRecipe, images: ImageSet, num_views: int, *, first: int = 0) -> tuple[Canary, ...]:
    """Up to 16 canaries, spread evenly over the samples and over the views `first` … `num_views` − 1."""
    count = min(MAX_CANARIES, len(images) * (num_views - first))
    steps, last = max(1, count - 1), num_views - 1 - first
    chosen = {(first + step * last // steps, step * (len(images) - 1) // steps) for step in range(count)}
    return tuple(_canary(views, images, view, index) for view, index in sorted(chosen))


def pixel_digest(pixels: npt.NDArray[np.uint8] | torch.Tensor) -> str:
    """32 hex digits of blake2b over the shape and the uint8 pixels in C order; tensors may be on any device."""
    array: npt.NDArray[Any] = np.ascontiguousarray(pixels.cpu().numpy() if hasattr(pixels, "cpu") else pixels)
    digest = hashlib.blake2b("x".join(map(str, array.shape)).encode(), digest_size=16)
    digest.update(array.data)
    return digest.hexdigest()


def _canary(views: ViewRecipe, images: ImageSet, view: int, index: int) -> Canary:
    import torch

    samples = np.array([index])
    pixels = views.apply(torch.from_numpy(np.ascontiguousarray(images.load(samples))), samples, view)
    return Canary(view=view, index=index, pixel_digest=pixel_digest(pixels[0]))


def _difference(cache: CachedSamples, images: ImageSet) -> tuple[str, object, object] | None:
    """The first difference: (what, expected, found)."""
    return (
        _class_difference(cache.class_names, images.class_names)
        or _size_difference(cache, images)
        or _pixel_difference(cache, images)
        or _content_difference(cache, images)
        or _label_difference(cache, images)
        or _order_difference(cache, images)
    )


def _class_difference(expected: tuple[str, ...], found: tuple[str, ...]) -> tuple[str, object, object] | None:
    if expected == found:
        return None
    if len(expected) != len(found):
        return "another number of classes", len(expected), len(found)
    first = next(number for number, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    what = "same classes in another order" if sorted(expected) == sorted(found) else "other class names"
    if unicodedata.normalize("NFC", expected[first]) == unicodedata.normalize("NFC", found[first]):
        what = "class names in another Unicode form (NFC and NFD)"
        return f"{what}, first at class {first}", ascii(expected[first]), ascii(found[first])
    return f"{what}, first at class {first}", repr(expected[first]), repr(found[first])


def _size_difference(cache: CachedSamples, images: ImageSet) -> tuple[str, object, object] | None:
    if cache.num_samples != len(images):
        return "another number of samples", cache.num_samples, len(images)
    expected = cache.recipe.dataset.image_size
    if expected != tuple(images.image_size):
        return "another image size", "×".join(map(str, expected)), "×".join(map(str, images.image_size))
    return None


def _pixels_of(identity: DatasetIdentity) -> tuple[object, ...]:
    """How files become pixels."""
    return identity.image_size, identity.background, identity.value_range


def _pixel_difference(cache: CachedSamples, images: ImageSet) -> tuple[str, object, object] | None:
    built_from, given = cache.recipe.dataset, images.identity()
    for field, default in (("background", "white"), ("value_range", "as the files declare")):
        expected, found = getattr(built_from, field), getattr(given, field)
        if expected != found:
            return f"another dataset.{field}", expected or default, found or default
    return None


def _endings_note(cache: CachedSamples, images: ImageSet) -> str:
    """A hint where all samples that the cache lacks have endings that version 0.1 left out."""
    files = getattr(images, "files", None)
    if files is None or len(images) <= cache.num_samples:
        return ""
    new = [files[row] for row in _unmatched(images.keys, cache.sample_keys)]
    if any(path.suffix.lower() in FIRST_EXTENSIONS for path in new):
        return ""
    return f" (version 0.1 left out {len(new):,} of these images because of their endings, such as {new[0].name})"


def _content_difference(cache: CachedSamples, images: ImageSet) -> tuple[str, object, object] | None:
    """Images of the cache that are missing from the split, in any order."""
    if np.array_equal(cache.sample_keys, images.keys):
        return None
    missing, new = _unmatched(cache.sample_keys, images.keys), _unmatched(images.keys, cache.sample_keys)
    if not missing:
        return None
    files = getattr(images, "files", None)
    found = images.keys[new[0]].tobytes().hex() if files is None else f"{files[new[0]]}, which is not in the cache"
    what = f"other contents of {len(missing):,} samples, first at sample {missing[0]}"
    return what, f"key {cache.sample_keys[missing[0]].tobytes().hex()}", found


def _label_difference(cache: CachedSamples, images: ImageSet) -> tuple[str, object, object] | None:
    """Images that have another label than in the cache, in any order."""
    of_images, of_cache = _sorted_rows(cache, images)
    differing = np.flatnonzero(images.labels[of_images] != cache.labels[of_cache])
    if not len(differing):
        return None
    first = differing[np.argmin(of_cache[differing])]
    what = f"other labels of {len(differing):,} samples, first at sample {of_cache[first]}"
    names = cache.class_names
    return what, names[cache.labels[of_cache[first]]], names[images.labels[of_images[first]]]


def _order_difference(cache: CachedSamples, images: ImageSet) -> tuple[str, object, object] | None:
    differing = np.flatnonzero((cache.sample_keys != images.keys).any(axis=1))
    if not len(differing):
        return None
    first = differing[0]
    keys = (keys[first].tobytes().hex() for keys in (cache.sample_keys, images.keys))
    return f"same images in another order, first at sample {first}", *keys


def _unmatched(keys: npt.NDArray[np.uint8], others: npt.NDArray[np.uint8]) -> list[int]:
    """Rows of `keys` without an equal row in `others`; each row of `others` is matched at most once."""
    left = Counter(key.tobytes() for key in others)
    unmatched = []
    for row, key in enumerate(keys):
        if left[key.tobytes()] > 0:
            left[key.tobytes()] -= 1
        else:
            unmatched.append(row)
    return unmatched


def _matching_rows(cache: CachedSamples, images: ImageSet) -> npt.NDArray[np.int64] | None:
    """For each sample of the cache, the row of `images` with its content and label; None if one has no match."""
    if cache.num_samples != len(images):
        return None
    of_images, of_cache = _sorted_rows(cache, images)
    same_keys = np.array_equal(images.keys[of_images], cache.sample_keys[of_cache])
    if not same_keys or not np.array_equal(images.labels[of_images], cache.labels[of_cache]):
        return None
    rows = np.empty(len(of_images), np.int64)
    rows[of_cache] = of_images
    return rows


def _sorted_rows(cache: CachedSamples, images: ImageSet) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of the images, and rows of the cache, both sorted by content and label."""
    return _sort_by_content(images.keys, images.labels), _sort_by_content(cache.sample_keys, cache.labels)


def _sort_by_content(keys: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows sorted by content key, then label; a stable sort."""
    words = np.ascontiguousarray(keys).view(">u8")
    return np.lexsort((labels, words[:, 1], words[:, 0])).astype(np.int64)
