"""Are these the samples and the pixels that the cache was built from? Asked before the first training step."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from cache_tools.errors import MismatchError
from cache_tools.format.manifest import Canary
from cache_tools.views.recipe import ViewRecipe

if TYPE_CHECKING:
    import torch

    from cache_tools.format.manifest import Manifest
    from cache_tools.format.recipe import CacheRecipe
    from cache_tools.images.image_set import ImageSet

MAX_CANARIES = 16


class CachedSamples(Protocol):
    """What the checks ask of a cache; a `TeacherCache` is one."""

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
    """Compare a split with the one the cache was built from: canvas, class names, samples, contents, order, labels.

    Raises:
        MismatchError: says precisely what differs first.
    """
    expected, found = cache.recipe.dataset, images.identity()
    if expected.content_digest == found.content_digest and expected.image_size == found.image_size:
        return
    what, want, have = _difference(cache, images) or ("its digest", expected.content_digest, found.content_digest)
    raise MismatchError(
        f"this dataset is not the one the cache was built from: {what}",
        where=f"{images.name}, split {images.split}",
        expected=want,
        found=have,
        next_step=f"give the images of {expected.name}, split {expected.split}, that the cache was built from, "
        "or build a cache of these",
    )


def aligned(cache: CachedSamples, images: ImageSet) -> ImageSet:
    """The samples of a split in the order of the cache, found by content key: files may be renamed or shuffled.

    Labels go with the images. Where the same image is there several times, each takes one that has its label.

    Returns:
        `images` itself if it is in the cache's order already.

    Raises:
        MismatchError: not the same images, labels, classes or canvas; says precisely what differs first.
    """
    if cache.recipe.dataset.content_digest != images.content_digest and cache.class_names == images.class_names:
        rows = _matching_rows(cache, images)
        images = images if rows is None else images.subset(rows)
    check_dataset(cache, images)
    return images


def check_canaries(cache: CachedSamples, images: ImageSet) -> None:
    """Make the views of a few samples again and compare their pixels with those the teachers saw.

    Raises:
        MismatchError: view code or image decoding has drifted; names the first view and sample.
    """
    for canary in cache.manifest.canaries:
        found = _canary(cache.recipe.views, images, canary.view, canary.index).pixel_digest
        if found != canary.pixel_digest:
            raise MismatchError(
                "these are not the pixels that the teachers saw",
                where=f"view {canary.view} of sample {canary.index}",
                expected=f"pixel digest {canary.pixel_digest}",
                found=found,
                next_step="use the versions of teacher-cache and of the image libraries that `cache-tools info` shows, "
                "or build the cache again",
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
    """What differs first: (what, expected, found)."""
    return (
        _class_difference(cache.class_names, images.class_names)
        or _size_difference(cache, images)
        or _content_difference(cache, images)
        or _label_difference(cache, images)
        or _order_difference(cache, images)
    )


def _class_difference(expected: tuple[str, ...], found: tuple[str, ...]) -> tuple[str, object, object] | None:
    if expected == found:
        return None
    if len(expected) != len(found):
        return "another number of classes", len(expected), len(found)
    first = next(number for number, names in enumerate(zip(expected, found, strict=True)) if names[0] != names[1])
    what = "same classes in another order" if sorted(expected) == sorted(found) else "other class names"
    return f"{what}, first at class {first}", repr(expected[first]), repr(found[first])


def _size_difference(cache: CachedSamples, images: ImageSet) -> tuple[str, object, object] | None:
    if cache.num_samples != len(images):
        return "another number of samples", cache.num_samples, len(images)
    expected = cache.recipe.dataset.image_size
    if expected != tuple(images.image_size):
        return "another image size", "×".join(map(str, expected)), "×".join(map(str, images.image_size))
    return None


def _content_difference(cache: CachedSamples, images: ImageSet) -> tuple[str, object, object] | None:
    """Images that are not there, whatever their order is."""
    if np.array_equal(cache.sample_keys, images.keys):
        return None
    lost, new = _not_among(cache.sample_keys, images.keys), _not_among(images.keys, cache.sample_keys)
    if not lost:
        return None
    files = getattr(images, "files", None)
    strange = images.keys[new[0]].tobytes().hex() if files is None else f"{files[new[0]]}, which it does not know"
    what = f"other contents of {len(lost):,} samples, first at sample {lost[0]}"
    return what, f"key {cache.sample_keys[lost[0]].tobytes().hex()}", strange


def _label_difference(cache: CachedSamples, images: ImageSet) -> tuple[str, object, object] | None:
    """Labels that are not those of the same images, whatever their order is."""
    here, there = _sort_by_content(images.keys, images.labels), _sort_by_content(cache.sample_keys, cache.labels)
    differing = np.flatnonzero(images.labels[here] != cache.labels[there])
    if not len(differing):
        return None
    first = differing[np.argmin(there[differing])]
    what = f"other labels of {len(differing):,} samples, first at sample {there[first]}"
    names = cache.class_names
    return what, names[cache.labels[there[first]]], names[images.labels[here[first]]]


def _order_difference(cache: CachedSamples, images: ImageSet) -> tuple[str, object, object] | None:
    differing = np.flatnonzero((cache.sample_keys != images.keys).any(axis=1))
    if not len(differing):
        return None
    first = differing[0]
    keys = (keys[first].tobytes().hex() for keys in (cache.sample_keys, images.keys))
    return f"same images in another order, first at sample {first}", *keys


def _not_among(keys: npt.NDArray[np.uint8], others: npt.NDArray[np.uint8]) -> list[int]:
    """Rows of keys that `others` has not, or not as often."""
    left = Counter(key.tobytes() for key in others)
    lost = []
    for row, key in enumerate(keys):
        if left[key.tobytes()] > 0:
            left[key.tobytes()] -= 1
        else:
            lost.append(row)
    return lost


def _matching_rows(cache: CachedSamples, images: ImageSet) -> npt.NDArray[np.int64] | None:
    """For each sample of the cache the one of `images` with its content and label; None if they do not pair up."""
    if cache.num_samples != len(images):
        return None
    here, there = _sort_by_content(images.keys, images.labels), _sort_by_content(cache.sample_keys, cache.labels)
    same_keys = np.array_equal(images.keys[here], cache.sample_keys[there])
    if not same_keys or not np.array_equal(images.labels[here], cache.labels[there]):
        return None
    rows = np.empty(len(here), np.int64)
    rows[there] = here
    return rows


def _sort_by_content(keys: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Samples by content key, then label; those that are alike in both in their own order."""
    words = np.ascontiguousarray(keys).view(">u8")
    return np.lexsort((labels, words[:, 1], words[:, 0])).astype(np.int64)
