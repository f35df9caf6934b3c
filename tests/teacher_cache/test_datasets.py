"""CachedDataset: the batches of train-student in a loop of one's own, with and without workers."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

from cache_tools.errors import CacheError, IncompleteError, MismatchError, RecipeError
from cache_tools.format.recipe import Preprocessing
from cache_tools.images import open_images
from cache_tools.images.arrays import ArrayImages
from cache_tools.images.image_set import ImageSet
from cache_tools.preprocess import prepare
from cache_tools.reader import TeacherCache
from cache_tools.views.mix import MixRecipe
from cache_tools.views.recipe import ViewRecipe
from teacher_cache import CachedDataset
from tests.support import tiny_run
from tests.support.preloaded import CONTEXT
from tests.support.turns import slow
from train.data import open_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> TeacherCache:
    return TeacherCache.open(tiny_run.write_cache(tmp_path_factory.mktemp("cache") / "tiny.zarr", pictures))


class OwnGenerator:
    """A transform whose random numbers are not those of torch, NumPy and Python."""

    def __init__(self, change: Callable[[torch.Tensor, float], torch.Tensor]) -> None:
        self.change, self.generator = change, torch.Generator()

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.change(pixels, float(torch.rand((), generator=self.generator)))


def seed(transform: Any) -> None:
    torch.manual_seed(1)
    if isinstance(transform, OwnGenerator):
        transform.generator.manual_seed(1)


def in_memory(images: ImageSet) -> ImageSet:
    names = ("name", "split", "class_names", "labels", "keys", "image_size")
    return ArrayImages(**{name: getattr(images, name) for name in names}, pixels=images.load(slice(None)))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, rows in one.items():
        assert rows.dtype == other[name].dtype, name
        assert torch.equal(rows, other[name]), name


def test_batches_are_those_of_train_student(cache: TeacherCache, tmp_path: Path) -> None:
    """For as many epochs as there are views, and one more."""
    recipe = tiny_run.recipe(cache.path, tmp_path, seed=7, batch_size=16, epochs=cache.num_views + 1)
    data = open_data(recipe, CPU)
    feed = data.feed(recipe, CPU)
    loader = CachedDataset(cache, features=True).loader(16, seed=7)
    for epoch in range(recipe.epochs):
        count = 0
        for ours, theirs in zip(loader, feed.epoch(epoch), strict=True):
            assert torch.equal(ours["index"], theirs.index)
            assert torch.equal(ours["labels"], theirs.labels)
            assert torch.equal(ours["pixel_values"], prepare(theirs.pixels, data.preprocessing))
            assert torch.equal(ours["teacher_logits"], cache.load_view(epoch % cache.num_views).logits(ours["index"]))
            count += 1
        assert count == len(loader) == feed.steps_per_epoch
    feed.close()


def test_items_are_rows_of_batches(cache: TeacherCache) -> None:
    data = CachedDataset(cache, features=True, epoch=1)
    batch = data.batch([3, 0, 49, 3])
    same(default_collate([data[number] for number in (3, 0, -1, 3)]), batch)
    assert {name: tuple(rows.shape) for name, rows in batch.items()} == {
        "pixel_values": (4, 3, 16, 16),
        "labels": (4,),
        "index": (4,),
        "teacher_logits": (4, cache.num_classes),
        "teacher_features": (4, cache.recipe.fusion.feature_dim),
    }
    with pytest.raises(IndexError):
        data[50]
    rows = data.__getitems__([3, 0, 49, 3])
    same(default_collate(rows), batch)  # type: ignore[arg-type]
    same(default_collate(list(rows[1:3])), {name: part[1:3] for name, part in batch.items()})
    same(data.collate_fn(rows), batch)
    same(data.collate_fn([data[3], data[0], data[49], data[3]]), batch)
    assert "teacher_features" not in CachedDataset(cache)[0]


@pytest.mark.medium
@pytest.mark.parametrize("method", ["forkserver", "fork", slow("spawn")])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_running_workers_see_the_next_epoch(cache: TeacherCache, method: str) -> None:
    alone, data = CachedDataset(cache), CachedDataset(cache)
    options: dict[str, Any] = {
        "multiprocessing_context": CONTEXT if method == "forkserver" else method,
        "persistent_workers": True,
        "num_workers": 1,
    }
    loader, expected = data.loader(16, **options), alone.loader(16)
    for epoch in (0, 1, 5, 6):
        if epoch == 5:
            loader.batch_sampler.set_epoch(5)
            alone.set_epoch(5)
        for batch, each in zip(loader, expected, strict=True):
            same(batch, each)
        assert data.epoch == alone.epoch == epoch
        assert data.view == epoch % cache.num_views


def test_a_loader_of_ones_own_works_too(cache: TeacherCache) -> None:
    data = CachedDataset(cache)
    data.set_epoch(2)
    batches = list(DataLoader(data, batch_size=20))
    assert [len(batch["index"]) for batch in batches] == [20, 20, 10]
    same(batches[2], data.batch(range(40, 50)))


def test_each_rank_has_its_part_of_every_batch(cache: TeacherCache) -> None:
    whole = [batch["index"].tolist() for batch in CachedDataset(cache).loader(16)]
    parts = [CachedDataset(cache).loader(16, rank=rank, world_size=4) for rank in range(4)]
    joined = [torch.cat([part["index"] for part in each]).tolist() for each in zip(*parts, strict=True)]
    assert joined == [batch for batch in whole if len(batch) >= 4]
    with pytest.raises(RecipeError, match="does not divide among the ranks"):
        CachedDataset(cache).loader(16, world_size=3)
    with pytest.raises(RecipeError, match="no such rank"):
        CachedDataset(cache).loader(16, rank=2, world_size=2)


def test_pixels_that_are_kept_are_those_that_are_not(cache: TeacherCache, monkeypatch: pytest.MonkeyPatch) -> None:
    images = in_memory(open_images(cache.manifest.dataset))
    kept, made = CachedDataset(cache, images), CachedDataset(cache, images)
    monkeypatch.setattr(CachedDataset, "_keeps_pixels", True)
    first = kept.batch([5, 2])
    monkeypatch.setattr(CachedDataset, "_keeps_pixels", False)
    same(first, made.batch([5, 2]))


def test_some_of_the_images_have_their_numbers_in_the_cache(cache: TeacherCache) -> None:
    rows = np.array([30, 4, 11])
    part = CachedDataset(cache, open_images(cache.manifest.dataset).subset(rows))
    everything = CachedDataset(cache)
    assert len(part) == 3
    same(part.batch([0, 1, 2]), everything.batch(rows))
    assert part.batch([2])["index"].tolist() == [11]


def test_images_in_another_order_are_put_into_that_of_the_cache(cache: TeacherCache) -> None:
    turned = open_images(cache.manifest.dataset).subset(np.arange(49, -1, -1))
    same(CachedDataset(cache, turned).batch([0, 7]), CachedDataset(cache).batch([0, 7]))


def test_chosen_views_are_cycled_through(cache: TeacherCache) -> None:
    data = CachedDataset(cache, views=[2, 0])
    for epoch, view in enumerate([2, 0, 2, 0]):
        data.set_epoch(epoch)
        assert data.view == view


def test_mixed_views_have_both_labels(tmp_path: Path, pictures: Path) -> None:
    views = ViewRecipe(ops=("flip",), mix=MixRecipe(mixup_alpha=1.0))
    path = tiny_run.write_cache(tmp_path / "mixed.zarr", pictures, views=views)
    data = CachedDataset(path, epoch=1)
    batch = next(iter(data.loader(8)))
    assert torch.equal(batch["label_share"].view(-1, 2)[:, 0], batch["label_share"].view(-1, 2)[:, 1]), "pairs"
    assert torch.equal(batch["partner_labels"].view(-1, 2).flip(1).flatten(), batch["labels"])
    with pytest.raises(RecipeError, match="mix images of the whole cache"):
        CachedDataset(path, open_images(data.cache.manifest.dataset).subset(np.arange(10)))


def test_test_images_are_prepared_as_train_student_does(cache: TeacherCache) -> None:
    data = CachedDataset(cache)
    test = data.test()
    images = open_images(cache.manifest.dataset, "test")
    mean, std = cache.manifest.dataset.normalisation
    expected = prepare(torch.from_numpy(images.load(slice(3))), Preprocessing(mean=mean, std=std))
    batch = next(iter(DataLoader(test, batch_size=3, collate_fn=test.collate_fn)))
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == images.labels[:3].tolist()
    assert len(test) == 21


@pytest.mark.parametrize(
    "transform",
    [
        v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.2] * 3)]),
        v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
        v2.RandomGrayscale(0.5),
        torch.nn.Identity(),
        OwnGenerator(lambda pixels, chance: (pixels * chance).to(torch.uint8)),
    ],
)
def test_transforms_of_colours_are_allowed(cache: TeacherCache, transform: Any) -> None:
    data = CachedDataset(cache, transform=transform)
    pixels = data.cache.recipe.views.apply(torch.from_numpy(data.images.load(np.array([4]))), [4], 0)
    seed(transform)
    given = data.batch([4])["pixel_values"]
    seed(transform)
    assert torch.equal(given, transform(pixels))


@pytest.mark.parametrize(
    ("transform", "problem"),
    [
        (v2.RandomHorizontalFlip(), "pixels of one colour"),
        (v2.RandomCrop(16, padding=2), "pixels of one colour"),
        (v2.RandomErasing(p=0.2), "pixels of one colour"),
        (v2.GaussianBlur(3), "pixels of one colour"),
        (v2.RandomRotation(5), "pixels of one colour"),
        (OwnGenerator(lambda pixels, chance: pixels.flip(3) if chance < 0.5 else pixels), "pixels of one colour"),
        (v2.Resize(20), "another size.*found .2, 3, 20, 20."),
        (v2.ToPILImage(), "cannot be applied to a batch"),
        (lambda pixels: None, "does not give a tensor.*found NoneType"),
        (lambda pixels: pixels[0], "another size"),
    ],
)
def test_transforms_that_move_pixels_are_refused(cache: TeacherCache, transform: Any, problem: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(RecipeError, match=problem):
        CachedDataset(cache, transform=transform)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_images_and_views_are_refused(cache: TeacherCache, tmp_path: Path, pictures: Path) -> None:
    others = open_images(tiny_run.dataset(tiny_run.write_pictures(tmp_path / "others", seed=5)))
    with pytest.raises(MismatchError):
        CachedDataset(cache, others)
    with pytest.raises(CacheError, match="view"):
        CachedDataset(cache, views=[99])
    with pytest.raises(RecipeError, match="no view is chosen"):
        CachedDataset(cache, views=[])
    half = tiny_run.write_cache(tmp_path / "half.zarr", pictures, blocks=1)
    with pytest.raises(IncompleteError):
        CachedDataset(half)


def test_a_pickled_dataset_reads_the_same(cache: TeacherCache) -> None:
    data = CachedDataset(cache, features=True, epoch=2)
    first = data.batch([1, 2])
    restored = pickle.loads(pickle.dumps(data))
    assert restored._held == {}
    same(restored.batch([1, 2]), first)


def test_numbers_that_make_no_sense_are_refused(cache: TeacherCache) -> None:
    data = CachedDataset(cache)
    for wrong in ({"world_size": 0}, {"seed": -1}):
        with pytest.raises(RecipeError, match="too small"):
            data.loader(16, **wrong)
    for refused in (lambda: data.set_epoch(-1), lambda: CachedDataset(cache, epoch=-1)):
        with pytest.raises(RecipeError, match="no such epoch"):
            refused()
    for rows in ([-1], [len(data)]):
        with pytest.raises(IndexError, match=f"of {len(data)}"):
            data.batch(rows)
    masks: tuple[Any, ...] = (np.ones(len(data), bool), [0.5])
    for mask in masks:
        with pytest.raises(TypeError, match="by their numbers"):
            data.batch(mask)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"views": 3}, r"views are chosen by their numbers .*views=.*found 3"),
        ({"views": "01"}, "views are chosen by their numbers"),
        ({"views": [0.0]}, "not a whole number .*views=.*found 0.0"),
        ({"epoch": None}, "not a whole number .*epoch=.*found None"),
        ({"images": "train"}, "another type .*images=.*expected what open_images returns.*found str: 'train'"),
        ({"data_dir": 3}, "another type .*data_dir="),
        ({"transform": 3}, "another type .*transform=.*expected a function"),
        ({"fusion": 0.5}, "another type .*fusion="),
    ],
)
def test_arguments_of_other_types_are_refused(cache: TeacherCache, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        CachedDataset(cache, **arguments)


def test_sizes_of_other_types_are_refused(cache: TeacherCache) -> None:
    data: Any = CachedDataset(cache)
    for arguments in ({"batch_size": 2.5}, {"batch_size": 16, "seed": None}, {"batch_size": 16, "rank": True}):
        with pytest.raises(RecipeError, match=r"not a whole number .*CachedDataset\.loader"):
            data.loader(**arguments)
    with pytest.raises(RecipeError, match=r"another type .*cache="):
        CachedDataset(None)  # type: ignore[arg-type]
