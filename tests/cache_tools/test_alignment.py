from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_tools.alignment import MAX_CANARIES, _copies_in_cache, aligned, make_canaries, pixel_digest, rows_in_cache
from cache_tools.errors import MismatchError
from cache_tools.format import commits
from cache_tools.images.arrays import ArrayImages
from cache_tools.reader import TeacherCache
from cache_tools.views.recipe import ViewRecipe
from tests.support.cache_factory import VIEWS, build, tiny_images, tiny_manifest

IMAGES = tiny_images()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    path = tmp_path_factory.mktemp("verify") / "c"
    build(path, tiny_manifest(IMAGES), IMAGES)
    return TeacherCache.open(path)


def test_commits_and_images_compute_the_same_content_digest() -> None:
    assert commits.content_digest(IMAGES.keys, IMAGES.labels, IMAGES.class_names) == IMAGES.content_digest


def test_the_dataset_of_the_cache_is_accepted(cache: TeacherCache) -> None:
    cache.check_dataset(IMAGES)
    cache.check_dataset(replace(IMAGES, name="folder", split="all", keys=IMAGES.keys.copy()))


def swapped(images: ArrayImages) -> ArrayImages:
    order = np.arange(75)
    order[[20, 50]] = order[[50, 20]]
    return replace(images, keys=images.keys[order], labels=images.labels[order], pixels=images.pixels[order])


def relabelled(images: ArrayImages) -> ArrayImages:
    labels = images.labels.copy()
    labels[[33, 40]] = (labels[[33, 40]] + 1) % 5
    return replace(images, labels=labels)


def edited(images: ArrayImages) -> ArrayImages:
    keys = images.keys.copy()
    keys[12, 3] ^= 1
    return replace(images, keys=keys)


def without(images: ArrayImages, *rows: int) -> ArrayImages:
    return images.subset(np.delete(np.arange(len(images)), rows))


def with_extra(images: ArrayImages, count: int) -> ArrayImages:
    extra = tiny_images(count, seed=5)
    return replace(
        images,
        keys=np.concatenate([images.keys, extra.keys]),
        labels=np.concatenate([images.labels, extra.labels]),
        pixels=np.concatenate([images.pixels, extra.pixels]),
    )


def renamed(images: ArrayImages, *names: str) -> ArrayImages:
    return replace(images, class_names=names)


LABEL = IMAGES.labels[33]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (without(IMAGES, 74), r"1 image is missing, first sample 74 of class class_\d .*expected 75 images; found 74"),
        (without(IMAGES, 7, 9), r"2 images are missing, first sample 7 .*found 73. Put them back, or build"),
        (with_extra(IMAGES, 1), r"1 image was added .*expected 75 images; found also .* Move it out of the split, or"),
        (tiny_images(num_classes=6), r"6 classes, not 5 .*expected no others; found 'class_5'"),
        (
            renamed(IMAGES, "class_0", "class_1", "cat", "class_3", "class_4"),
            r"other class names .*expected 'class_2'; found 'cat'. Rename 'cat' back, or build",
        ),
        (
            renamed(IMAGES, "class_0", "class_1", "class_3", "class_2", "class_4"),
            r"same classes in another order, first at class 2 .*expected 'class_2'; found 'class_3'",
        ),
        (swapped(IMAGES), r"same images in another order, first at sample 20"),
        (edited(IMAGES), r"other contents of 1 images, first sample 12 of class class_\d \("),
        (tiny_images(seed=9), r"other contents of 75 images, first sample 0 .*were they all saved again"),
        (
            relabelled(IMAGES),
            rf"other labels of 2 samples, first at sample 33 .*class_{LABEL}; found class_{(LABEL + 1) % 5}",
        ),
        (replace(IMAGES, image_size=(28, 32)), r"another image size .*expected 32×32; found 28×32"),
    ],
)
def test_the_first_difference_of_another_dataset_is_named(
    cache: TeacherCache, other: ArrayImages, message: str
) -> None:
    with pytest.raises(MismatchError, match=message) as caught:
        cache.check_dataset(other)
    assert "digits, split train" in str(caught.value)


def test_canaries_accept_the_pixels_that_the_teachers_saw(cache: TeacherCache) -> None:
    assert len(cache.manifest.canaries) == MAX_CANARIES
    assert {canary.view for canary in cache.manifest.canaries} == {0, 1, 2}
    cache.check_canaries(IMAGES)


def test_canaries_find_images_that_decode_differently(cache: TeacherCache) -> None:
    canary = cache.manifest.canaries[5]
    pixels = IMAGES.pixels.copy()
    pixels[canary.index] ^= 1  # as another JPEG decoder would do; keys are digests of the files and stay the same
    drifted = replace(IMAGES, pixels=pixels)
    cache.check_dataset(drifted)
    with pytest.raises(MismatchError, match=rf"not the pixels .*sample {canary.index}\)"):
        cache.check_canaries(drifted)


def test_canaries_find_changed_view_code(cache: TeacherCache, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ViewRecipe.finish

    def shifted(self: ViewRecipe, images: torch.Tensor, index: np.ndarray, view: int) -> torch.Tensor:
        return real(self, images, index, view).roll(1, dims=-1)

    monkeypatch.setattr(ViewRecipe, "finish", shifted)
    with pytest.raises(MismatchError, match="not the pixels that the teachers saw"):
        cache.check_canaries(IMAGES)


def test_canaries_are_digests_of_applied_views() -> None:
    for canary in make_canaries(VIEWS, IMAGES, 3):
        pixels = VIEWS.apply(torch.from_numpy(IMAGES.pixels), np.arange(75), canary.view)[canary.index]
        assert canary.pixel_digest == pixel_digest(pixels) == pixel_digest(pixels.numpy())


@pytest.mark.parametrize(("samples", "views"), [(1, 1), (1, 40), (2, 3), (75, 1), (500, 200)])
def test_canaries_span_all_samples_and_views(samples: int, views: int) -> None:
    canaries = make_canaries(VIEWS, tiny_images(samples), views)
    assert 1 <= len(canaries) <= min(MAX_CANARIES, samples * views)
    assert {0, samples - 1} <= {canary.index for canary in canaries}
    assert {0, views - 1} <= {canary.view for canary in canaries}
    assert len(set(canaries)) == len(canaries)


def test_the_pixel_digest_sees_values_shape_and_order() -> None:
    pixels = IMAGES.pixels[0]
    others = [pixels.reshape(3, 16, 64), pixels[::-1], pixels.transpose(0, 2, 1), pixels ^ 1]
    assert len({pixel_digest(array) for array in (pixels, *others)}) == 5


def test_a_grown_cache_keeps_its_canaries(tmp_path: Path) -> None:
    from cache_tools.store.writer import CacheWriter

    manifest = tiny_manifest(IMAGES)
    build(tmp_path / "c", manifest, IMAGES)
    CacheWriter.resume(tmp_path / "c", manifest.fingerprint).grow(6)
    grown = TeacherCache.open(tmp_path / "c")
    assert grown.num_views == 6
    assert grown.manifest.canaries == manifest.canaries
    grown.check_canaries(IMAGES)


# Another order


def shuffled(images: ArrayImages, seed: int = 0) -> ArrayImages:
    order = np.random.default_rng(seed).permutation(len(images))
    return replace(images, keys=images.keys[order], labels=images.labels[order], pixels=images.pixels[order])


def test_shuffled_samples_are_put_into_the_order_of_the_cache(cache: TeacherCache) -> None:
    found = aligned(cache, shuffled(IMAGES))
    assert found.content_digest == IMAGES.content_digest
    np.testing.assert_array_equal(found.load(slice(None)), IMAGES.pixels)
    cache.check_dataset(found)
    cache.check_canaries(found)
    assert aligned(cache, IMAGES) is IMAGES


def test_copies_of_an_image_keep_their_labels(tmp_path: Path) -> None:
    """Four copies of sample 3, one of them with another label."""
    rows = np.array([3, *range(10), 3, 3])
    twins = replace(IMAGES, keys=IMAGES.keys[rows], labels=IMAGES.labels[rows].copy(), pixels=IMAGES.pixels[rows])
    twins.labels[-1] = (twins.labels[-1] + 1) % 5
    build(tmp_path / "c", tiny_manifest(twins), twins)
    found = aligned(TeacherCache.open(tmp_path / "c"), shuffled(twins))
    assert found.content_digest == twins.content_digest


@pytest.mark.parametrize("change", [relabelled, edited])
def test_a_change_besides_the_order_is_still_refused(cache: TeacherCache, change: Callable[..., ArrayImages]) -> None:
    with pytest.raises(MismatchError, match="not the one the cache was built from"):
        aligned(cache, shuffled(change(IMAGES)))


# A part of the cached images


def test_rows_in_the_cache_are_found_in_any_order(cache: TeacherCache) -> None:
    rows = np.random.default_rng(3).permutation(75)[:20]
    np.testing.assert_array_equal(rows_in_cache(cache, IMAGES.subset(rows)), rows)


@settings(max_examples=60, deadline=None)
@given(held=st.integers(1, 40), given_=st.integers(1, 40), different=st.integers(1, 20), seed=st.integers(0, 99))
def test_copies_are_matched_one_by_one(held: int, given_: int, different: int, seed: int) -> None:
    """Random copies of a few images, against a list of free rows for each content and label."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 256, (different, 16), dtype=np.uint8)

    def drawn(count: int) -> Any:
        chosen = keys[rng.integers(0, different, count)]
        return replace(tiny_images(count), keys=chosen, labels=rng.integers(0, 2, count))

    cached, images = drawn(held), drawn(given_)
    free: dict[tuple[bytes, int], list[int]] = {}
    for row in range(held):
        free.setdefault((cached.keys[row].tobytes(), int(cached.labels[row])), []).append(row)
    expected = []
    for key, label in zip(images.keys, images.labels, strict=True):
        rows = free.get((key.tobytes(), int(label)))
        expected.append(rows.pop(0) if rows else -1)
    cache: Any = SimpleNamespace(num_samples=held, sample_keys=cached.keys, labels=cached.labels)
    assert _copies_in_cache(cache, images).tolist() == expected


def test_copies_in_a_part_get_rows_of_their_own(tmp_path: Path) -> None:
    rows = np.array([3, *range(10), 3])
    twins = replace(IMAGES, keys=IMAGES.keys[rows], labels=IMAGES.labels[rows], pixels=IMAGES.pixels[rows])
    build(tmp_path / "c", tiny_manifest(twins), twins)
    found = rows_in_cache(TeacherCache.open(tmp_path / "c"), twins.subset(np.array([11, 5, 4])))
    np.testing.assert_array_equal(found, [0, 5, 4])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (tiny_images(4, seed=9), "an image is not in the cache"),
        (IMAGES.subset(np.array([4, 4])), "an image is not in the cache"),  # once in the cache, twice here
        (renamed(IMAGES, "a", "b", "c", "d", "e"), "other class names"),
        (replace(IMAGES, image_size=(28, 32)), "another image size"),
    ],
)
def test_images_that_the_cache_lacks_are_refused(cache: TeacherCache, part: ArrayImages, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        rows_in_cache(cache, part)
