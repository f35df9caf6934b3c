"""Views of version 2 from the files of a folder to a trained student: build, canaries, replay, training, evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cache_tools.errors import MismatchError
from cache_tools.images import open_images
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.integrity.images import check_images
from cache_tools.reader import TeacherCache
from cache_tools.views import ViewRecipe
from pipeline.build.cache import build_cache
from pipeline.networks.ensemble import load_ensemble
from pipeline.online import LiveTeachers
from pipeline.recipe import BuildRecipe
from pipeline.replay import replay
from tests.support import hf_files, tiny_build, tiny_run
from train.data import open_data
from train.feed import NoTargets, ResidentFeed, StreamingFeed, open_feed
from train.run import train_on

pytestmark = pytest.mark.medium

CPU = torch.device("cpu")
STRONG: dict[str, Any] = {
    "version": 2,
    "ops": [{"op": "random-resized-crop", "size": 16}, "flip", "rand-augment", "random-erasing"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many sizes, and an untrained teacher."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 42), ("test", 6)):
        for number in range(count):
            label = number % 3
            pixels = rng.integers(0, 160, (20 + 3 * (number % 7), 50 - 4 * (number % 8), 3))
            pixels[..., 2 - label] += 60
            file = root / "pictures" / split / tiny_run.CLASSES[label] / f"{number:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    tiny_build.write_teacher(root / "teacher.safetensors")
    return root


def plan(root: Path, name: str, **changes: Any) -> BuildRecipe:
    settings = {"dataset": {"name": "folder", "data_dir": str(root / "pictures")}, "num_views": 2, "batch_size": 64}
    return tiny_build.recipe(root, out=root / name, **(settings | changes))


def test_a_cache_of_original_pictures_trains_as_live_teachers_do(root: Path) -> None:
    build = plan(root, "strong", views=STRONG)
    assert build.dataset.image_size == 18  # the student's 16 pixels are 7/8 of it
    cache = TeacherCache(build_cache(build).path)
    report, images = check_images(cache)
    assert report.sound
    assert report.canaries == 16
    assert images is not None
    assert replay(cache, images, 40, device="cpu").sound
    run = tiny_run.recipe(cache.path, root / "run", epochs=2, batch_size=21)
    data = open_data(run, CPU)
    assert data.view_size == (16, 16)
    assert (data.test_preprocessing.size, data.test_preprocessing.crop) == ((16, 16), 16 / 18)
    ensemble = load_ensemble(build.teacher, build.clip, build.fusion, data.images, build.dataset, CPU, "float32")
    weights = []
    for name, source in (("cached", data), ("live", replace(data, targets=LiveTeachers(ensemble), cache=None))):
        this = run.model_copy(update={"out": root / name})
        train_on(source, this, CPU)
        weights.append(load_file(root / name / "last.safetensors"))
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    drifted = [canary.model_copy(update={"pixel_digest": "0" * 32}) for canary in cache.manifest.canaries]
    cache.__dict__["manifest"] = cache.manifest.model_copy(update={"canaries": tuple(drifted)})
    with pytest.raises(MismatchError, match="not the pixels that the teachers saw"):
        cache.check_canaries(images)


def test_original_pictures_of_a_hugging_face_data_set(root: Path, tmp_path: Path) -> None:
    """Targets, test images and the student's pixels are those of the folder that the data set was made from."""
    hf_files.hub_files(hf_files.folder_tables(root / "pictures"), tmp_path / "set")
    dataset = {"name": "hf", "data_dir": str(tmp_path / "set")}
    recipes = plan(root, "of-folder", views=STRONG), plan(root, "of-hf", views=STRONG, dataset=dataset)
    assert [recipe.dataset.image_size for recipe in recipes] == [18, 18]
    folder, cache = (TeacherCache(build_cache(recipe).path) for recipe in recipes)
    assert tiny_build.arrays_of(cache.path) == tiny_build.arrays_of(folder.path)
    assert cache.recipe.views.version == 2
    report, images = check_images(cache)
    assert report.sound
    assert images is not None
    assert replay(cache, images, 20, device="cpu").sound
    seen = []
    for one in (folder, cache):
        run = tiny_run.recipe(one.path, tmp_path / "unused")
        data = open_data(run, CPU)
        feed = data.feed(run, CPU)
        seen.append([torch.from_numpy(data.tests[0].load(slice(None))), *(batch.pixels for batch in feed.epoch(1))])
        feed.close()
    assert len(seen[0]) == len(seen[1]) > 1
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


def test_networks_get_the_sizes_of_the_recipe(root: Path) -> None:
    """CLIP's stored features are those of its larger views, and the student trains on smaller ones."""
    views = {**STRONG, "sizes": {"clip": 32, "student": 12}}
    build = plan(root, "sizes", views=views, store="components")
    assert build.dataset.image_size == 14
    cache = TeacherCache(build_cache(build).path)
    _, images = check_images(cache)
    assert images is not None
    assert replay(cache, images, 20, device="cpu").sound
    index = np.arange(20)
    pictures = [torch.from_numpy(picture) for picture in images.pictures(index)]
    ensemble = load_ensemble(build.teacher, build.clip, build.fusion, images, build.dataset, CPU, "float32")
    larger = cache.recipe.views.seen_by("clip").apply(pictures, index, 1)
    assert larger.shape[2:] == (32, 32)
    expected = ensemble.outputs(larger).clips[0].features
    stored = cache.load_view(1).component_features(torch.from_numpy(index))[1]
    assert float((stored - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    data = open_data(tiny_run.recipe(cache.path, root / "unused"), CPU)
    feed = data.feed(tiny_run.recipe(cache.path, root / "unused"), CPU)
    batch = next(feed.epoch(1))
    feed.close()
    chosen = [torch.from_numpy(picture) for picture in images.pictures(batch.index.numpy())]
    assert torch.equal(batch.pixels, cache.recipe.views.seen_by("student").apply(chosen, batch.index, 1))
    assert batch.pixels.shape[2:] == (12, 12)


def batches(data: dict[str, Any], kind: Any) -> list[torch.Tensor]:
    feed = kind(data["images"], data["views"], 2, NoTargets(), batch_size=16, epochs=2, seed=1, device=CPU, known=None)
    try:
        return [batch.pixels for batch in feed.epoch(1)]
    finally:
        feed.close()


def test_images_in_memory_are_cropped_there() -> None:
    images = open_images(DatasetRecipe(name="digits", split="train[:50]"))
    views = ViewRecipe.model_validate(STRONG | {"sizes": {"student": 20}}).seen_by("student")
    data = {"images": images, "views": views}
    resident, streamed = batches(data, ResidentFeed), batches(data, StreamingFeed)
    assert all(torch.equal(one, other) for one, other in zip(resident, streamed, strict=True))
    assert resident[0].shape == (16, 3, 20, 20)
    options: dict[str, Any] = {"batch_size": 16, "epochs": 2, "seed": 1, "device": CPU}
    chosen = open_feed(images, views, 2, NoTargets(), **options)
    assert isinstance(chosen, ResidentFeed)
    chosen.close()


def test_pictures_of_files_are_streamed(root: Path) -> None:
    images = open_images(DatasetRecipe(name="folder", data_dir=root / "pictures", image_size=18))
    options: dict[str, Any] = {"batch_size": 16, "epochs": 2, "seed": 1, "device": CPU}
    for views, kind in ((STRONG, StreamingFeed), ({"ops": ["rand-augment"]}, ResidentFeed)):
        feed = open_feed(images, ViewRecipe.model_validate(views), 2, NoTargets(), **options)
        assert isinstance(feed, kind)
        feed.close()
