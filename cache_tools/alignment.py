"""Check before training that samples and pixels are those that the cache was built from."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cache_tools.errors import MismatchError
from cache_tools.format.manifest import DECODER, Canary
from cache_tools.images import open_images, whole_split
from cache_tools.images.check import without_damaged
from cache_tools.images.formats import FIRST_EXTENSIONS, decoder_versions
from cache_tools.views.recipe import ViewRecipe

if TYPE_CHECKING:
    import torch

    from cache_tools.format.manifest import Manifest
    from cache_tools.format.recipe import CacheRecipe
    from cache_tools.images.image_set import ImageSet
    from cache_tools.images.recipe import DatasetIdentity, DatasetRecipe

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
    difference = _difference(cache, images)
    if difference is None:
        difference = _Difference("its digest", built_from.content_digest, given.content_digest)
    use_others = f"use the images of {built_from.name}, split {built_from.split}, that the cache was built from"
    raise MismatchError(
        f"this dataset is not the one the cache was built from: {difference.what}",
        where=f"{images.name}, split {images.split}",
        expected=difference.expected,
        found=difference.found,
        next_step=f"{difference.next_step or use_others}, or build a cache of these (build-cache with another --out)"
        f"{_endings_note(cache, images)}",
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


def rows_in_cache(cache: CachedSamples, images: ImageSet) -> npt.NDArray[np.int64]:
    """The sample of the cache that each image is, int64 [N], by content key and label; images in any order.

    Of several copies of an image, the first one is the first of the cache's.

    Raises:
        MismatchError: other classes or canvas, or an image that the cache does not hold.
    """
    difference = _class_difference(cache.class_names, images.class_names) or _size_difference(cache, images)
    difference = difference or _pixel_difference(cache, images)
    rows = np.empty(0, np.int64)
    if difference is None:
        rows = _copies_in_cache(cache, images)
        if (rows < 0).any():
            found = _name(images, int(np.argmax(rows < 0)))
            difference = _Difference("an image is not in the cache", f"some of its {cache.num_samples:,} images", found)
    if difference is not None:
        raise MismatchError(
            f"these are not images of the cache: {difference.what}",
            where=f"{images.name}, split {images.split}",
            expected=difference.expected,
            found=difference.found,
            next_step="choose images that are in the cache, or build a cache of these",
        )
    return rows


def open_cached(
    cache: CachedSamples,
    dataset: DatasetRecipe,
    open_split: Callable[[DatasetRecipe, str | None], ImageSet] = open_images,
) -> ImageSet:
    """Open the split that a cache was built from.

    With `on_bad_image: skip` the samples of the cache are known to be sound, so that only the others are checked. What
    the build left out stays out, also where a file was repaired or another decoder reads it: rows keep their numbers.
    """
    if dataset.on_bad_image == "error" or whole_split(dataset.split) != dataset.split:
        return open_split(dataset, None)
    images = open_split(dataset.model_copy(update={"on_bad_image": "error"}), None)
    return without_damaged(images, sound=cache.sample_keys, skipped=_skipped(cache.manifest))


def _skipped(manifest: Manifest) -> dict[str, str]:
    """Name → reason of the images that the build of a cache left out; empty if the manifest does not say it."""
    folders = manifest.provenance.get("folders")
    folder = folders.get(manifest.dataset.split) if isinstance(folders, dict) else None
    damaged = folder.get("damaged") if isinstance(folder, dict) else None
    return {name: str(reason) for name, reason in damaged.items()} if isinstance(damaged, dict) else {}


def check_canaries(cache: CachedSamples, images: ImageSet) -> None:
    """Make a few views again and compare their pixels with those that the teachers saw.

    Raises:
        MismatchError: view code or image decoding has changed; names the first view and sample.
    """
    check_manifest_canaries(cache.manifest, images)


def check_manifest_canaries(manifest: Manifest, images: ImageSet) -> None:
    """`check_canaries` of a cache that is still being built."""
    for canary in manifest.canaries:
        found = _canary(manifest.recipe.views, images, canary.view, canary.index).pixel_digest
        if found != canary.pixel_digest:
            raise MismatchError(
                "these are not the pixels that the teachers saw",
                where=f"view {canary.view} of sample {canary.index}",
                expected=f"pixel digest {canary.pixel_digest}",
                found=f"{found}{_other_decoders(manifest)}",
                next_step="install the versions of teacher-cache and of the image libraries that `cache-tools info` "
                "shows, or build the cache again",
            )


def _other_decoders(manifest: Manifest) -> str:
    """The libraries that decode images now in another version than when the cache was built, as the end of a line."""
    stored = manifest.provenance.get(DECODER)
    if not isinstance(stored, dict):
        return ""
    now = decoder_versions()
    changed = [f"{name} {now.get(name, 'missing')}, was {was}" for name, was in stored.items() if now.get(name) != was]
    return f" ({'; '.join(changed)})" if changed else ""


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
    samples = np.array([index])
    pixels = views.finish(views.load(images, samples, samples, view), samples, view)
    return Canary(view=view, index=index, pixel_digest=pixel_digest(pixels[0]))


class _Difference(NamedTuple):
    what: str
    expected: object
    found: object
    next_step: str | None = None


def _difference(cache: CachedSamples, images: ImageSet) -> _Difference | None:
    """The first difference between a split and the one that the cache was built from."""
    return (
        _class_difference(cache.class_names, images.class_names)
        or _size_difference(cache, images)
        or _pixel_difference(cache, images)
        or _content_difference(cache, images)
        or _label_difference(cache, images)
        or _order_difference(cache, images)
    )


def _class_difference(expected: tuple[str, ...], found: tuple[str, ...]) -> _Difference | None:
    if expected == found:
        return None
    if sorted(expected) == sorted(found):
        first = next(number for number, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
        what = f"same classes in another order, first at class {first}"
        return _Difference(what, repr(expected[first]), repr(found[first]))
    forms = [unicodedata.normalize("NFC", name) for name in found]
    if sorted(unicodedata.normalize("NFC", name) for name in expected) == sorted(forms):
        first = next(number for number, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
        what = f"class names in another Unicode form (NFC and NFD), first at class {first}"
        return _Difference(what, ascii(expected[first]), ascii(found[first]))
    lost = [name for name in expected if name not in set(found)]
    new = [name for name in found if name not in set(expected)]
    what = "other class names" if len(expected) == len(found) else f"{len(found)} classes, not {len(expected)}"
    next_step = f"rename {_few(new)} back" if len(lost) == len(new) else None
    return _Difference(what, _few(lost) or "no others", _few(new) or f"no class {_few(lost)}", next_step)


def _size_difference(cache: CachedSamples, images: ImageSet) -> _Difference | None:
    expected = cache.recipe.dataset.image_size
    if expected == tuple(images.image_size):
        return None
    return _Difference("another image size", "×".join(map(str, expected)), "×".join(map(str, images.image_size)))


def _pixels_of(identity: DatasetIdentity) -> tuple[object, ...]:
    """How files become pixels."""
    return identity.image_size, identity.background, identity.value_range


def _pixel_difference(cache: CachedSamples, images: ImageSet) -> _Difference | None:
    built_from, given = cache.recipe.dataset, images.identity()
    for field, default in (("background", "white"), ("value_range", "as the files declare")):
        expected, found = getattr(built_from, field), getattr(given, field)
        if expected != found:
            return _Difference(f"another dataset.{field}", expected or default, found or default)
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


def _content_difference(cache: CachedSamples, images: ImageSet) -> _Difference | None:
    """Images of the cache that are missing from the split, and images that are new there, in any order."""
    if np.array_equal(cache.sample_keys, images.keys):
        return None
    missing, new = _unmatched(cache.sample_keys, images.keys), _unmatched(images.keys, cache.sample_keys)
    if not missing and not new:
        return None
    count = f"{cache.num_samples:,} images"
    added = f"{_name(images, new[0])}{f' and {len(new) - 1:,} more' if len(new) > 1 else ''}" if new else ""
    if not missing:
        what = f"{len(new):,} image{'s were' if len(new) > 1 else ' was'} added"
        return _Difference(what, count, f"also {added}", f"move {'them' if len(new) > 1 else 'it'} out of the split")
    first = f"sample {missing[0]} of class {_named(cache.labels[missing[0]], cache.class_names)}"
    if not new:
        what = f"{len(missing):,} image{'s are' if len(missing) > 1 else ' is'} missing, first {first}"
        return _Difference(what, count, f"{len(images):,}", f"put {'them' if len(missing) > 1 else 'it'} back")
    what = f"other contents of {len(missing):,} images, first {first}"
    if len(missing) == len(new) == cache.num_samples:
        what += " (were they all saved again, or converted?)"
    key = cache.sample_keys[missing[0]].tobytes().hex()
    return _Difference(what, f"a file with key {key}", f"{added}, not in the cache")


def _name(images: ImageSet, row: int) -> str:
    """The file of an image, or its content key where it has no file of its own."""
    files = getattr(images, "files", None)
    return f"an image with key {images.keys[row].tobytes().hex()}" if files is None else str(files[row])


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (", …" if len(names) > 4 else "")


def _label_difference(cache: CachedSamples, images: ImageSet) -> _Difference | None:
    """Images that have another label than in the cache, in any order."""
    of_images, of_cache = _sorted_rows(cache, images)
    different = images.labels[of_images] != cache.labels[of_cache]
    differing = np.flatnonzero(different if different.ndim == 1 else different.any(axis=1))
    if not len(differing):
        return None
    first = differing[np.argmin(of_cache[differing])]
    what = f"other labels of {len(differing):,} samples, first at sample {of_cache[first]}"
    names = cache.class_names
    labels_of_cache, labels_of_images = cache.labels[of_cache[first]], images.labels[of_images[first]]
    return _Difference(what, _named(labels_of_cache, names), _named(labels_of_images, names))


def _order_difference(cache: CachedSamples, images: ImageSet) -> _Difference | None:
    differing = np.flatnonzero((cache.sample_keys != images.keys).any(axis=1))
    if not len(differing):
        return None
    first = differing[0]
    keys = (keys[first].tobytes().hex() for keys in (cache.sample_keys, images.keys))
    return _Difference(f"same images in another order, first at sample {first}", *keys)


def _named(label: npt.NDArray[np.integer], names: tuple[str, ...]) -> str:
    """The class of a label or, of a row of 0 and 1, the classes."""
    if label.ndim == 0:
        return names[int(label)]
    return "; ".join(names[place] for place in np.flatnonzero(label)) or "no label"


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


def _copies_in_cache(cache: CachedSamples, images: ImageSet) -> npt.NDArray[np.int64]:
    """The row of the cache with the content and label of each image, of n copies the n-th; −1 where there is none."""
    keys = np.concatenate([cache.sample_keys, images.keys])
    labels = np.concatenate([cache.labels, images.labels])
    # Of equal ones the rows of the cache come first, as the sort is stable, then the images.
    order = _sort_by_content(keys, labels)
    is_new = np.ones(len(order), np.bool_)
    by_row = labels.reshape(len(labels), -1)
    is_new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1) | (by_row[order[1:]] != by_row[order[:-1]]).any(
        axis=1
    )
    starts = np.flatnonzero(is_new)
    group = np.cumsum(is_new) - 1
    held = np.bincount(group[order < cache.num_samples], minlength=len(starts))
    places = np.flatnonzero(order >= cache.num_samples)
    first, count = starts[group[places]], held[group[places]]
    copy = places - first - count
    rows = np.full(len(images), -1, np.int64)
    has = copy < count
    rows[order[places[has]] - cache.num_samples] = order[first[has] + copy[has]]
    return rows


def _sorted_rows(cache: CachedSamples, images: ImageSet) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of the images, and rows of the cache, both sorted by content and label."""
    return _sort_by_content(images.keys, images.labels), _sort_by_content(cache.sample_keys, cache.labels)


def _sort_by_content(keys: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Rows sorted by content key, then label; a stable sort."""
    words = np.ascontiguousarray(keys).view(">u8")
    by_label = (labels,) if labels.ndim == 1 else tuple(labels.T)
    return np.lexsort((*by_label, words[:, 1], words[:, 0])).astype(np.int64)
