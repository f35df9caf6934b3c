"""Corrupted copies: they are ImageNet-C's, are made once, and are the same bytes however they are made."""

# ruff: noqa: NPY002  # the package draws from numpy's global generator
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_tools.errors import DataError, RecipeError
from cache_tools.images import open_images
from cache_tools.images.arrays import ArrayImages
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import DatasetRecipe
from tests.support.turns import some
from train.evaluate import corrupt
from train.evaluate.corrupt import corrupt_images, corrupted_copies
from train.evaluate.corruptions import CORRUPTIONS, SEVERITIES


@pytest.fixture(scope="module", autouse=True)
def imagecorruptions() -> Any:
    return pytest.importorskip("imagecorruptions")


@pytest.fixture(scope="module")
def photos() -> ImageSet:
    """24 tiles of a photo."""
    from skimage.data import astronaut

    pixels = np.ascontiguousarray(astronaut()[:128, 128:320].reshape(4, 32, 6, 32, 3).transpose(0, 2, 4, 1, 3))
    return ArrayImages(
        name="photo",
        split="test[:50%]",
        class_names=("a", "b", "c"),
        labels=np.arange(24) % 3,
        keys=np.arange(24, dtype=np.uint8).repeat(16).reshape(24, 16),
        image_size=(32, 32),
        pixels=pixels.reshape(24, 3, 32, 32),
    )


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def nhwc(images: ImageSet, index: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.load(index).transpose(0, 2, 3, 1))


def test_the_names_are_the_packages(imagecorruptions: Any) -> None:
    assert list(CORRUPTIONS) == imagecorruptions.get_corruption_names()


@pytest.mark.medium
@pytest.mark.parametrize("name", some(CORRUPTIONS, 5))
def test_a_copy_depends_only_on_the_image_and_its_index(photos: ImageSet, name: str) -> None:
    index = np.arange(24)
    for severity in (1, 5):
        together = corrupt_images(nhwc(photos, index), index, name, severity)
        np.random.seed(99)
        np.random.random(7)
        for row in (23, 4):
            alone = corrupt_images(nhwc(photos, index[[row]]), index[[row]], name, severity)
            assert np.array_equal(alone[0], together[row])


@pytest.mark.medium
@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"defocus_blur", "zoom_blur", "brightness", "contrast",
                                                             "pixelate", "jpeg_compression"}))  # fmt: skip
def test_random_corruptions_differ_between_images_and_seeds(photos: ImageSet, name: str) -> None:
    index = np.arange(2)
    darkest = int(photos.load(slice(None)).mean(axis=(1, 2, 3)).argmin())  # snow turns bright images all white
    twice = nhwc(photos, np.array([darkest, darkest]))
    made = corrupt_images(twice, index, name, 4)
    assert not np.array_equal(made[0], made[1])
    assert not np.array_equal(made, corrupt_images(twice, index, name, 4, seed=1))


def test_simple_corruptions_equal_their_formulas(photos: ImageSet) -> None:
    """Contrast equals a few lines of float64; gaussian noise has the spread of the paper's code."""
    index = np.arange(24)
    clean = nhwc(photos, index).astype(np.float64) / 255
    for severity, factor in zip(SEVERITIES, (0.4, 0.3, 0.2, 0.1, 0.05), strict=True):
        means = clean.mean(axis=(1, 2), keepdims=True)
        expected = np.clip((clean - means) * factor + means, 0, 1) * 255
        made = corrupt_images(nhwc(photos, index), index, "contrast", severity)
        assert np.abs(made - expected).max() <= 1.0
    grey = np.full((24, 32, 32, 3), 128, np.uint8)
    for severity, sigma in ((1, 0.08), (2, 0.12)):
        made = corrupt_images(grey, index, "gaussian_noise", severity)
        assert made.std() / 255 == pytest.approx(sigma, rel=0.02)


def test_the_random_state_of_the_caller_does_not_change(photos: ImageSet) -> None:
    np.random.seed(3)
    expected = np.random.random(5)
    np.random.seed(3)
    corrupt_images(nhwc(photos, np.arange(2)), np.arange(2), "gaussian_noise", 2)
    assert np.array_equal(np.random.random(5), expected)


@pytest.mark.medium
@pytest.mark.slow
def test_processes_make_the_same_files_as_one(photos: ImageSet, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = corrupted_copies(photos)
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(home / "other"))
    two = corrupted_copies(photos, workers=2)
    assert one.folder.name == two.folder.name
    names = sorted(path.name for path in one.folder.iterdir())
    assert names == sorted(["corruptions.json", "labels.npy", *(f"{name}.npy" for name in CORRUPTIONS)])
    for name in names:
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


@pytest.mark.medium
def test_copies_are_made_once_and_a_few_are_a_subset_of_all(
    photos: ImageSet, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = corrupted_copies(photos, 7)
    assert some.index.tolist() == [0, 3, 6, 10, 13, 17, 20]
    assert len(list((home / "corruptions").iterdir())) == 1
    everything = corrupted_copies(photos)
    assert np.array_equal(everything.labels, photos.labels)
    assert len(list((home / "corruptions").iterdir())) == 2
    monkeypatch.setattr(corrupt, "corrupt_images", None)  # a call would fail
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    again = corrupted_copies(photos, 7)
    assert again.folder == everything.folder, "a few are read from the copies of all, if they exist"
    assert np.array_equal(again.index, some.index)
    for name in CORRUPTIONS:
        whole = np.load(everything.folder / f"{name}.npy")
        assert whole.shape == (5 * 24, 32, 32, 3)
        for severity in SEVERITIES:
            assert np.array_equal(some.load(name, severity), again.load(name, severity))
            assert np.array_equal(everything.load(name, severity)[some.index], some.load(name, severity))


def test_other_images_seeds_or_sample_counts_have_other_folders(photos: ImageSet) -> None:
    index = np.arange(24)
    recipes = [
        corrupt._recipe(photos, index, 0),
        corrupt._recipe(photos, index, 1),
        corrupt._recipe(photos, index[:5], 0),
        corrupt._recipe(photos.subset(index[::-1]), index, 0),
    ]
    folders = {corrupt._folder(recipe) for recipe in recipes}
    assert len(folders) == len(recipes)
    assert all(folder.name.startswith("photo-test_50_-") for folder in folders)


def test_an_interrupted_run_resumes(photos: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = corrupt.corrupt_images

    def stop(pixels: Any, index: Any, name: str, severity: int, seed: int) -> Any:
        made.append(name)
        if name == "motion_blur" and severity == 3:
            raise KeyboardInterrupt
        return real(pixels, index, name, severity, seed)

    monkeypatch.setattr(corrupt, "corrupt_images", stop)
    with pytest.raises(KeyboardInterrupt):
        corrupted_copies(photos, 6)
    folder = corrupt._folder(corrupt._recipe(photos, np.arange(6), 0))
    assert not (folder / "labels.npy").exists()
    assert not list(folder.glob("*.partial"))
    made.clear()

    def record(pixels: Any, index: Any, name: str, severity: int, seed: int) -> Any:
        made.append(name)
        return real(pixels, index, name, severity, seed)

    monkeypatch.setattr(corrupt, "corrupt_images", record)
    resumed = corrupted_copies(photos, 6)
    assert set(made) == set(CORRUPTIONS[CORRUPTIONS.index("motion_blur") :])
    index = resumed.index
    for name in ("shot_noise", "motion_blur", "pixelate"):
        assert np.array_equal(resumed.load(name, 4).transpose(0, 2, 3, 1), real(nhwc(photos, index), index, name, 4, 0))


def test_the_folder_records_how_it_was_made(photos: ImageSet) -> None:
    made = corrupted_copies(photos, 2)
    recipe = json.loads((made.folder / "corruptions.json").read_text())
    assert recipe["samples"] == 2
    assert recipe["content_digest"] == photos.content_digest
    assert recipe["made_with"]["numpy"] == np.__version__
    assert made.source.startswith("imagecorruptions-imaug ")


def test_small_images_are_an_error(tmp_path: Path) -> None:
    from tests.support import tiny_run

    pictures = open_images(tiny_run.dataset(tiny_run.write_pictures(tmp_path / "p", train=3, test=3)), "test")
    with pytest.raises(DataError, match=r"too small.*32 × 32.*16 × 16"):
        corrupted_copies(pictures)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corrupt, "PACKAGE", "no-such-package")
    with pytest.raises(RecipeError, match=r"teacher-cache\[robustness\]"):
        corrupted_copies(open_images(DatasetRecipe(name="digits"), "test"), 2)
