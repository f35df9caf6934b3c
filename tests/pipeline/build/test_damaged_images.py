"""Builds from folders that hold more or other things than sound images of plainly named classes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from cache_tools.alignment import check_manifest_canaries, open_cached
from cache_tools.errors import DataError, MismatchError, RecipeError
from cache_tools.images import check, open_images
from cache_tools.images.decode import Finding, PixelRules
from cache_tools.images.formats import decoder_versions
from cache_tools.integrity.images import check_images
from cache_tools.reader import TeacherCache
from pipeline.build.cache import build_cache
from tests.support import tiny_build, tiny_run
from train.data import open_data
from train.recipe import TrainRecipe


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_build.prepare(tmp_path_factory.mktemp("original"), train=30)


@pytest.fixture
def root(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    check._memory.cache_clear()
    return Path(shutil.copytree(original, tmp_path / "root"))


def recipe(root: Path, views: int = 1, **dataset: Any) -> Any:
    source = tiny_run.dataset(root / "pictures").model_dump() | dataset
    return tiny_build.recipe(root, dataset=source, num_views=views)


def damage(root: Path, *names: str) -> None:
    for name in names:
        file = root / "pictures" / name
        file.write_bytes(file.read_bytes()[:-30])


BAD = ("train/blue/003.png", "train/red/002.png", "train/red/029.png", "test/green/001.png")


def test_all_damaged_images_are_listed_before_networks_are_loaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(root, *BAD)
    monkeypatch.setattr("pipeline.networks.ensemble.load_ensemble", lambda *_, **__: pytest.fail("loaded the networks"))
    for _ in range(2):  # the second time from memory
        with pytest.raises(DataError, match=r"^4 damaged images") as caught:
            build_cache(recipe(root))
        assert [name for name in BAD if name not in str(caught.value)] == []
    assert not (root / "cache.zarr").exists()


@pytest.mark.medium
def test_skip_builds_the_rest_and_training_finds_the_same_images(root: Path, tmp_path: Path) -> None:
    damage(root, *BAD)
    lines: list[str] = []
    result = build_cache(recipe(root, on_bad_image="skip"), say=lines.append)
    cache = TeacherCache.open(root / "cache.zarr")
    assert cache.num_samples == 30 - 3
    assert np.bincount(cache.labels).tolist() == [9, 10, 8]
    assert f"note: {root}/pictures/train: 3 damaged images skipped" in "\n".join(lines)
    assert f"note: {root}/pictures/test: 1 damaged image skipped" in "\n".join(lines)
    assert result.folders is not None
    assert set(result.folders["train"]["damaged"]) == {"blue/003.png", "red/002.png", "red/029.png"}
    assert cache.manifest.provenance["folders"] == result.folders
    data = open_data(tiny_run.recipe(root / "cache.zarr", tmp_path / "run"), torch.device("cpu"))
    assert data.images.content_digest == cache.recipe.dataset.content_digest
    assert data.test is not None
    assert len(data.test) == 21 - 1
    assert len(data.notes()) == 2
    data.targets.close()
    report, _ = check_images(cache)
    assert report.sound
    # more views keep what was built
    second = build_cache(recipe(root, 2, on_bad_image="skip"))
    assert second.images == 27
    # a folder from which the files were removed is the same data set
    for name in BAD:
        (root / "pictures" / name).unlink()
    assert build_cache(recipe(root, 2)).images == 0


@pytest.mark.medium
def test_rows_keep_their_numbers_when_a_skipped_file_is_repaired(root: Path, tmp_path: Path) -> None:
    """Or when another decoder reads it: what was built stays in use. A file that is new is still an error."""
    whole = {name: (root / "pictures" / name).read_bytes() for name in BAD}
    damage(root, *BAD)
    build_cache(recipe(root, on_bad_image="skip"))
    cache = TeacherCache.open(root / "cache.zarr")
    for name, content in whole.items():
        (root / "pictures" / name).write_bytes(content)
    check._memory.cache_clear()
    data = open_data(tiny_run.recipe(root / "cache.zarr", tmp_path / "run"), torch.device("cpu"))
    np.testing.assert_array_equal(data.images.keys, cache.sample_keys)
    assert "3 damaged images skipped" in "\n".join(data.images.notes())
    data.targets.close()
    shutil.copy(root / "pictures/train/blue/000.png", root / "pictures/train/blue/new.png")
    with pytest.raises(MismatchError, match="1 image was added"):
        open_data(tiny_run.recipe(root / "cache.zarr", tmp_path / "run"), torch.device("cpu"))


@pytest.mark.medium
def test_the_decoder_is_in_the_provenance_and_in_the_error_about_canaries(root: Path) -> None:
    build_cache(recipe(root))
    manifest = TeacherCache.open(root / "cache.zarr").manifest
    assert manifest.provenance["decoder"] == decoder_versions()
    assert manifest.provenance["decoder"]["pillow"] == PIL.__version__
    images = open_images(manifest.dataset)
    drifted = manifest.canaries[0].model_copy(update={"pixel_digest": "0" * 32})
    older = manifest.provenance | {"decoder": {**decoder_versions(), "pillow": "9.1.0", "gone": "1"}}
    changed = manifest.model_copy(update={"canaries": (drifted,), "provenance": older})
    with pytest.raises(MismatchError, match=rf"\(pillow {PIL.__version__}, was 9\.1\.0; gone missing, was 1\)"):
        check_manifest_canaries(changed, images)


@pytest.mark.medium
def test_a_damaged_test_image_is_found_by_training_on_a_sound_cache(root: Path, tmp_path: Path) -> None:
    build_cache(recipe(root))
    damage(root, "test/red/002.png", "test/blue/003.png")
    with pytest.raises(DataError, match=r"2 damaged images.*blue/003\.png.*red/002\.png"):
        open_data(tiny_run.recipe(root / "cache.zarr", tmp_path / "run"), torch.device("cpu"))


@pytest.mark.medium
def test_training_may_skip_damaged_test_images_of_a_sound_cache(root: Path, tmp_path: Path) -> None:
    build_cache(recipe(root))
    damage(root, "test/red/002.png", "test/blue/003.png")
    changed = tiny_run.recipe(root / "cache.zarr", tmp_path / "run", dataset={"on_bad_image": "skip"})
    data = open_data(TrainRecipe.model_validate(changed.model_dump()), torch.device("cpu"))
    assert data.test is not None
    assert len(data.test) == 21 - 2
    assert len(data.images) == 30
    data.targets.close()


@pytest.mark.medium
def test_training_decodes_only_what_the_cache_does_not_have(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, where nothing is remembered."""
    damage(root, *BAD)
    build_cache(recipe(root, on_bad_image="skip"))
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "another home"))
    cache = TeacherCache.open(root / "cache.zarr")
    examined: list[bytes] = []

    def examine(data: bytes, rules: PixelRules) -> Finding:
        examined.append(data)
        return Finding(problem="bad")

    monkeypatch.setattr(check, "examine_image", examine)
    images = open_cached(cache, cache.manifest.dataset)
    assert len(images) == 27
    assert len(examined) == 3


@pytest.mark.medium
def test_a_part_of_a_cache_that_skipped_is_a_part_of_its_samples(root: Path, tmp_path: Path) -> None:
    damage(root, *BAD)
    build_cache(recipe(root, on_bad_image="skip", split="train[5:]"))
    cache = TeacherCache.open(root / "cache.zarr")
    assert cache.num_samples == 27 - 5
    changed = tiny_run.recipe(root / "cache.zarr", tmp_path / "run", dataset={"split": "train[7:20]"})
    data = open_data(TrainRecipe.model_validate(changed.model_dump()), torch.device("cpu"))
    np.testing.assert_array_equal(data.samples, np.arange(2, 15))
    np.testing.assert_array_equal(data.images.keys, cache.sample_keys[2:15])
    data.targets.close()


def test_a_test_split_that_is_elsewhere_is_no_error_without_preflight(root: Path) -> None:
    shutil.rmtree(root / "pictures" / "test")
    lines: list[str] = []
    build_cache(recipe(root), say=lines.append)
    assert lines[0].startswith("note: the test split is not checked: image folder not found")


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xfcber"])
def test_class_names_that_are_not_utf8_leave_nothing_behind(root: Path, name: bytes) -> None:
    os.rename(root / "pictures/train/blue", os.path.join(os.fsencode(root / "pictures/train"), name))
    for _ in range(2):
        with pytest.raises(DataError, match="the name of a class folder is not UTF-8"):
            build_cache(recipe(root))
    assert not list(root.glob("*cache*"))


def test_a_path_that_is_not_utf8_is_refused_before_the_work(root: Path) -> None:
    out = Path(os.fsdecode(os.path.join(os.fsencode(root), b"c\xe9.zarr")))
    with pytest.raises(RecipeError, match=r"not UTF-8.*out.*c\\udce9\.zarr"):
        build_cache(tiny_build.recipe(root, out=out))
    assert not out.exists()


def test_file_names_that_are_not_utf8_can_be_cached(root: Path) -> None:
    os.rename(
        root / "pictures/train/blue/003.png", os.path.join(os.fsencode(root / "pictures/train/blue"), b"\xe9.png")
    )
    assert build_cache(recipe(root)).manifest.num_samples == 30


@pytest.mark.medium
def test_a_build_does_not_continue_with_other_pixels(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an update of a decoder, or of version 0.1, which dropped transparency."""
    build_cache(recipe(root))
    monkeypatch.setattr("cache_tools.images.encoded.decode_image", lambda *_: np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(MismatchError, match="not the pixels that the teachers saw"):
        build_cache(recipe(root, 2))
    assert len(TeacherCache.open(root / "cache.zarr").complete_views) == 1


@pytest.mark.medium
def test_another_background_is_another_cache(root: Path) -> None:
    transparent = Image.new("RGBA", (16, 16), (0, 0, 255, 0))
    transparent.save(root / "pictures/train/blue/003.png")
    white = build_cache(recipe(root)).manifest
    again = build_cache(recipe(root, background=[255, 255, 255]))
    assert again.images == 0
    with pytest.raises(MismatchError, match="another recipe"):
        build_cache(recipe(root, background="black"))
    assert white.recipe.dataset.background is None


def test_files_that_are_no_images_are_noted(root: Path) -> None:
    for name, data in (("blue/notes.txt", b"sky\n"), ("red/.DS_Store", b"\0"), ("red/a.svg", b"<svg></svg>")):
        (root / "pictures" / "train" / name).write_bytes(data)
    (root / "pictures/train/red/002.png").rename(root / "pictures/train/red/002")
    lines: list[str] = []
    result = build_cache(recipe(root), say=lines.append)
    assert lines[0] == (
        f"note: {root}/pictures/train: 3 files of 33 left out: 1 text (blue/notes.txt); 1 hidden or made by a system "
        "(red/.DS_Store); 1 SVG (red/a.svg)"
    )
    assert result.manifest.num_samples == 30
    assert result.folders is not None
    assert result.folders["train"]["left_out"]["red/a.svg"] == "SVG"


@pytest.mark.medium
def test_sub_folders_that_look_like_classes_stop_the_build(root: Path) -> None:
    train = root / "pictures" / "train"
    for name in tiny_run.CLASSES:
        for number in range(2):
            (train / name / f"{name}{number}").mkdir()
        for count, file in enumerate(sorted(train.glob(f"{name}/*.png"))):
            file.rename(file.parent / f"{name}{count % 2}" / file.name)
    with pytest.raises(DataError, match=r"look like classes of their own.*sub_folders=merge \(3 classes\)"):
        build_cache(recipe(root))
    assert build_cache(recipe(root, sub_folders="merge")).manifest.recipe.dataset.class_names == tiny_run.CLASSES
