"""Which images, labels, views and targets a run gets from its settings, with a cache and without."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cache_tools.config import Changes, dump_yaml
from cache_tools.errors import CacheError, MismatchError, RecipeError
from cache_tools.images import open_images
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.reader import TeacherCache
from tests.support import tiny_run
from train.data import TrainingData, open_data, with_cached_images
from train.feed import Batch, ResidentFeed, StreamingFeed
from train.recipe import TrainRecipe
from train.recipe.loading import load_train_recipe
from train.recipe.loss import LossRecipe
from train.run import train_student
from train.runs.stored import open_run

CPU = torch.device("cpu")
SAMPLES = 50


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_run.write_pictures(tmp_path_factory.mktemp("pictures"))
    tiny_run.write_pictures(root / "more", test=9, train=3, seed=5)
    shutil.copytree(root / "more" / "test", root / "other")
    return root


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A cache of every second picture."""
    return tiny_run.write_cache(tmp_path_factory.mktemp("part") / "tiny.zarr", pictures, split="train[::2]")


def opened(cache: Path, dataset: dict[str, Any] | None, **changes: Any) -> TrainingData:
    return open_data(tiny_run.recipe(cache, Path("unused"), dataset=dataset, **changes), CPU)


def every(rows: slice) -> npt.NDArray[np.int64]:
    return np.arange(SAMPLES)[rows]


def batches(
    data: TrainingData, recipe: TrainRecipe, kind: type[ResidentFeed | StreamingFeed], epoch: int
) -> list[Batch]:
    feed = kind(
        data.images,
        data.views,
        data.num_views,
        data.targets,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        seed=recipe.seed,
        device=CPU,
        known=data.known,
        samples=data.samples,
    )
    try:
        return list(feed.epoch(epoch))
    finally:
        feed.close()


# A part of the cached samples


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train[::2]", slice(None, None, 2)),
        ("train[1::2]", slice(1, None, 2)),
        ("train[10%:]", slice(5, None)),
        ("train[:-7]", slice(None, -7)),
        ("train[3:40:5]", slice(3, 40, 5)),
    ],
)
@pytest.mark.parametrize("kind", [ResidentFeed, StreamingFeed])
def test_a_part_of_the_cache_has_its_own_targets_and_views(
    cache: Path, pictures: Path, split: str, rows: slice, kind: type[ResidentFeed | StreamingFeed]
) -> None:
    """Bit for bit: pixels, labels and targets of each batch are those of the same pictures in the whole cache."""
    recipe = tiny_run.recipe(cache, Path("unused"), dataset={"split": split}, loss={"kind": "kd", "feature": "mse"})
    data, whole = open_data(recipe, CPU), open_images(tiny_run.dataset(pictures))
    stored = TeacherCache.open(cache)
    chosen = every(rows)
    np.testing.assert_array_equal(data.images.keys, whole.keys[chosen])
    assert data.images.split == split
    for epoch in (0, 1):
        view = stored.load_view(epoch)
        seen = []
        for batch in batches(data, recipe, kind, epoch):
            samples = chosen[batch.index.numpy()]
            pixels = data.views.apply(torch.from_numpy(whole.load(samples)), samples, epoch)
            assert torch.equal(batch.pixels, pixels)
            assert batch.labels.tolist() == whole.labels[samples].tolist()
            assert torch.equal(torch.as_tensor(batch.targets.logits), view.logits(samples))
            assert torch.equal(torch.as_tensor(batch.targets.features), view.features(samples))
            seen += samples.tolist()
        assert sorted(seen) == chosen.tolist()


@pytest.mark.parametrize("kind", ["kd", "ce"])
@pytest.mark.parametrize(
    ("split", "notes"),
    [
        ("train[40%:]", (f"no training images of: {tiny_run.CLASSES[0]}",)),
        ("train[:50%]", (f"no training images of: {tiny_run.CLASSES[2]}",)),
        ("train[:5]", (f"no training images of: {tiny_run.CLASSES[1]}, {tiny_run.CLASSES[2]}",)),
        ("train[::5]", ()),
    ],
)
def test_classes_without_a_training_image_are_noted(cache: Path, split: str, notes: tuple[str, ...], kind: str) -> None:
    recipe = tiny_run.recipe(cache, Path("unused"), dataset={"split": split}, loss={"kind": kind})
    assert open_data(with_cached_images(recipe), CPU).notes() == notes


def test_two_halves_are_disjoint_and_complete(cache: Path) -> None:
    halves = [opened(cache, {"split": split}).samples for split in ("train[::2]", "train[1::2]")]
    assert np.sort(np.concatenate([half for half in halves if half is not None])).tolist() == list(range(SAMPLES))


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train[::4]", every(slice(None, None, 4))), ("train[10::10]", every(slice(10, None, 10)))],
)
def test_a_cache_of_a_part_gives_a_part_of_it(
    part: Path, pictures: Path, split: str, expected: npt.NDArray[np.int64]
) -> None:
    """The part is of the whole split, as everywhere; the targets are those of the samples."""
    data, whole = opened(part, {"split": split}), open_images(tiny_run.dataset(pictures))
    np.testing.assert_array_equal(data.images.keys, whole.keys[expected])
    assert data.samples is not None
    np.testing.assert_array_equal(TeacherCache.open(part).sample_keys[data.samples], whole.keys[expected])


def test_a_part_that_is_not_cached_is_refused(part: Path) -> None:
    with pytest.raises(MismatchError, match=r"does not hold all samples .*25 others of 50, the first one number 1\b"):
        opened(part, {"split": "train"})
    with pytest.raises(MismatchError, match="10 others of 10"):
        opened(part, {"split": "train[1:20:2]"})
    with pytest.raises(MismatchError, match="an image is not in the cache"):
        opened(part, {"split": "test"})


def test_renamed_files_stay_in_their_part(cache: Path, pictures: Path, tmp_path: Path) -> None:
    """A part is one of the samples in the order of the cache, whatever the files are called now."""
    shutil.copytree(pictures, tmp_path / "renamed")
    for file in sorted((tmp_path / "renamed" / "train").rglob("*.png"))[::3]:
        file.rename(file.with_name(f"z{file.name}"))
    data = opened(cache, {"split": "train[::2]", "test_split": "train[1::2]", "data_dir": str(tmp_path / "renamed")})
    whole = open_images(tiny_run.dataset(pictures))
    np.testing.assert_array_equal(data.images.keys, whole.keys[::2])
    np.testing.assert_array_equal(data.tests[0].keys, whole.keys[1::2])


def test_a_folder_with_some_of_the_pictures_is_a_part(cache: Path, pictures: Path, tmp_path: Path) -> None:
    """Known by their contents, in any order."""
    shutil.copytree(pictures, tmp_path / "folds")
    files = sorted((tmp_path / "folds" / "train").rglob("*.png"))
    for number, file in enumerate(reversed(files[::7])):
        target = tmp_path / "folds" / "fold" / file.parent.name / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    data = opened(cache, {"split": "fold", "data_dir": str(tmp_path / "folds")})
    assert data.samples is not None
    assert sorted(data.samples.tolist()) == list(range(0, SAMPLES, 7))
    np.testing.assert_array_equal(TeacherCache.open(cache).sample_keys[data.samples], data.images.keys)


def test_a_fraction_of_the_labels_of_a_part(cache: Path, pictures: Path) -> None:
    data = opened(cache, {"split": "train[::2]"}, label_fraction=0.4)
    chosen, whole = every(slice(None, None, 2)), open_images(tiny_run.dataset(pictures))
    assert data.known is not None
    assert (len(data.labels), data.known.labelled.sum()) == (25, 3 + 3 + 4)  # of classes of 8, 8 and 9 pictures
    largest = TeacherCache.open(cache).load_view(0).logits(chosen).argmax(1).numpy()
    expected = np.where(data.known.labelled, whole.labels[chosen], largest)
    np.testing.assert_array_equal(data.labels, expected)


@pytest.mark.medium
@pytest.mark.parametrize("loss", [{"kind": "kd"}, {"kind": "dkd", "feature": "crd", "crd_negatives": 8}])
def test_a_run_on_a_part_trains_and_compares_with_the_same_part(
    cache: Path, tmp_path: Path, loss: dict[str, Any]
) -> None:
    recipe = tiny_run.recipe(
        cache, tmp_path / "run", epochs=1, loss=loss, dataset={"split": "train[::2]"}, compare_with_labels=True
    )
    result = train_student(recipe)
    assert result.labels_only is not None
    assert (result.train_samples, result.labels_only.train_samples) == (25, 25)
    twin, _ = open_run(tmp_path / "run" / "labels-only")
    assert twin.dataset.split == "train[::2]"
    alone = train_student(twin.recipe.model_copy(update={"out": tmp_path / "alone"}))
    assert alone.last == result.labels_only.last


# The test split


def test_another_test_split_than_the_cache_records(cache: Path) -> None:
    assert [len(test) for test in opened(cache, None).tests] == [21]
    assert [len(test) for test in opened(cache, {"test_split": "other"}).tests] == [9]
    assert [len(test) for test in opened(cache, {"test_split": ["other", "test[:5]"]}).tests] == [9, 5]
    assert opened(cache, {"test_split": None}).tests == ()


@pytest.mark.medium
def test_a_stored_run_keeps_its_splits_and_folder(cache: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "moved")
    dataset = {"test_split": "other", "split": "train[::5]", "data_dir": str(tmp_path / "moved"), "name": "folder"}
    result = train_student(tiny_run.recipe(cache, tmp_path / "run", epochs=1, dataset=dataset))
    assert result.last is not None
    assert (result.test_split, result.last.n, result.train_samples) == ("other", 9, 10)
    run, _ = open_run(tmp_path / "run")
    assert (run.dataset.test_split, run.dataset.split) == ("other", "train[::5]")
    assert run.dataset.data_dir == tmp_path / "moved"
    again = load_train_recipe(str(tmp_path / "run" / "recipe.yaml"))
    assert again.values() == run.recipe.values() == tiny_run.recipe(cache, tmp_path, epochs=1, dataset=dataset).values()


def test_a_recipe_of_an_earlier_version_reads_as_it_was_trained(cache: Path, pictures: Path, tmp_path: Path) -> None:
    """It holds a dataset and views in full, of the built-in recipe, which the run did not use."""
    recipe = tiny_run.recipe(cache, tmp_path / "run", epochs=1)
    train_student(recipe)
    unused = load_train_recipe("digits", [], {"loss": {"kind": "ce"}})
    stored = dump_yaml(recipe.model_copy(update={"dataset": unused.dataset, "views": unused.views}))
    (tmp_path / "run" / "recipe.yaml").write_text(stored)
    assert "name: digits" in stored
    run, _ = open_run(tmp_path / "run")
    assert run.dataset == tiny_run.dataset(pictures).absolute()
    assert load_train_recipe(str(tmp_path / "run" / "recipe.yaml")).values() == recipe.values()


# What the cache determines


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["dataset.name=digits"], "built with another dataset.name .*expected folder; found digits"),
        (["dataset.image_size=32"], "another dataset.image_size .*expected 16; found 32"),
        (["views.base_seed=8"], "other views: views.base_seed .*expected 7; found 8"),
        (["views.clean_first=false"], "views.clean_first"),
        (["views.ops=[flip]"], "views.ops"),
        (["views.ops.0.padding=2"], "views.ops"),
        (["dataset.split=train[60:]"], "empty"),
        (["dataset.image_size=big"], r"image_size. \(dataset\)"),
    ],
)
def test_settings_that_the_cache_cannot_have_are_refused(cache: Path, settings: list[str], message: str) -> None:
    recipe = load_train_recipe("digits", settings, {"cache": str(cache), "device": "cpu"})
    with pytest.raises(CacheError, match=message):
        open_data(recipe, CPU)


@pytest.mark.parametrize(
    "settings",
    [
        ["dataset.name=folder"],
        ["dataset.image_size=16", "dataset.split=train"],
        ["views.base_seed=7", "views.clean_first=true"],
        ["views.ops=[{op: pad-crop}, {op: flip}]"],
    ],
)
def test_settings_that_the_cache_has_are_accepted(cache: Path, settings: list[str]) -> None:
    recipe = load_train_recipe("digits", settings, {"cache": str(cache), "device": "cpu"})
    assert len(open_data(recipe, CPU).images) == SAMPLES


def test_a_list_with_numbers_as_labels_serves_a_cache_of_a_folder(cache: Path, pictures: Path, tmp_path: Path) -> None:
    files = [file for split in ("train", "test") for file in sorted((pictures / split).glob("*/*"))]
    rows = [f"{file},{tiny_run.CLASSES.index(file.parent.name)},{file.parts[-3]}" for file in files]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]))

    def opened(order: Sequence[str]) -> int:
        settings = [
            "dataset.name=csv",
            f"dataset.data_dir={tmp_path}/list.csv",
            f"dataset.class_order=[{','.join(order)}]",
        ]
        return len(open_data(load_train_recipe("digits", settings, {"cache": str(cache), "device": "cpu"}), CPU).images)

    assert opened(tiny_run.CLASSES) == SAMPLES
    with pytest.raises(MismatchError, match="same classes in another order"):
        opened(tiny_run.CLASSES[::-1])


def test_unknown_keys_are_refused_with_a_cache_too(cache: Path) -> None:
    for setting, near in (("dataset.splt=train", "split"), ("views.seed=3", "base_seed")):
        with pytest.raises(RecipeError, match=f"unknown recipe key '{setting.partition('=')[0]}'.*{near}"):
            load_train_recipe("digits", [setting], {"cache": str(cache)})


def test_a_file_of_ones_own_may_repeat_what_the_cache_has(cache: Path, pictures: Path, tmp_path: Path) -> None:
    text = f"""
name: own
cache: {cache}
dataset: {{name: folder, data_dir: {pictures}, image_size: SIZE, test_split: other}}
views: {{base_seed: 7, clean_first: true, ops: [{{op: pad-crop}}, {{op: flip}}]}}
device: cpu
"""
    (tmp_path / "own.yaml").write_text(text.replace("SIZE", "16"))
    assert [len(test) for test in open_data(load_train_recipe(str(tmp_path / "own.yaml")), CPU).tests] == [9]
    (tmp_path / "other.yaml").write_text(text.replace("SIZE", "64"))
    with pytest.raises(MismatchError, match="expected 16; found 64"):
        open_data(load_train_recipe(str(tmp_path / "other.yaml")), CPU)


def test_the_digest_of_a_run_knows_its_splits_only_if_they_are_set(cache: Path) -> None:
    def values(dataset: dict[str, Any] | None) -> dict[str, Any]:
        return tiny_run.recipe(cache, Path("unused"), dataset=dataset).values()

    assert values(None)["dataset"] is None
    assert values({"data_dir": "/elsewhere", "name": "folder"}) == values(None)
    assert values({"split": "train[::2]"})["dataset"] == {"split": "train[::2]"}
    assert values({"test_split": None})["dataset"] == {"test_split": None}
    assert values({"test_split": ["test", "other"]})["dataset"] == {"test_split": ["test", "other"]}


# A cache named by a run on labels alone


def test_a_run_on_labels_alone_takes_the_images_of_a_named_cache(cache: Path, pictures: Path) -> None:
    options = {"cache": str(cache), "loss": {"kind": "ce"}, "device": "cpu"}
    recipe = with_cached_images(load_train_recipe("digits", ["dataset.split=train[1::2]"], options))
    assert recipe.dataset == tiny_run.dataset(pictures).absolute().model_copy(update={"split": "train[1::2]"})
    data = open_data(recipe, CPU)
    assert (len(data.images), data.num_views, data.views) == (25, 3, TeacherCache.open(cache).recipe.views)


def test_the_cache_of_a_built_in_recipe_is_not_needed_on_labels_alone() -> None:
    recipe = load_train_recipe("digits", [], {"loss": {"kind": "ce"}})
    assert (recipe.cache, recipe.dataset) == (None, DatasetRecipe(name="digits"))
    assert with_cached_images(recipe) is recipe


def test_with_a_cache_a_recipe_holds_changes_only(cache: Path) -> None:
    recipe = tiny_run.recipe(cache, Path("unused"), dataset={"split": "train[::2]"})
    assert recipe.dataset == Changes(split="train[::2]")
    assert TrainRecipe.model_validate(recipe.model_dump(mode="json")) == recipe
    labels = TrainRecipe(name="x", loss=LossRecipe(kind="ce"), dataset=DatasetRecipe(name="digits"))
    assert labels.own_views().ops == ()


# A place for a source that has none


def test_a_source_without_files_has_no_data_dir(tmp_path: Path) -> None:
    for settings in (["data_dir=/photos"], ["dataset.data_dir=/photos"]):
        with pytest.raises(RecipeError, match=r"digits has no folder of files.*/photos.*as the argument"):
            load_train_recipe("digits", settings, {"loss": {"kind": "ce"}})
    with pytest.raises(RecipeError, match="digits cannot be downloaded"):
        load_train_recipe("digits", [], {"loss": {"kind": "ce"}, "download": True})


def test_a_cache_of_a_folder_cannot_be_downloaded(cache: Path) -> None:
    for settings in ({"download": True}, {"dataset": {"download": True}}):
        with pytest.raises(RecipeError, match="folder cannot be downloaded"):
            open_data(tiny_run.recipe(cache, Path("unused"), **settings), CPU)


def test_the_folder_of_the_images_may_be_set_in_two_ways(cache: Path, pictures: Path, tmp_path: Path) -> None:
    """`data_dir` and `dataset.data_dir` mean the same; a folder that is not there is an error, whichever sets it."""
    shutil.copytree(pictures, tmp_path / "moved")
    moved = str(tmp_path / "moved")
    places: list[dict[str, Any]] = [{"data_dir": moved}, {"dataset": {"data_dir": moved}}]
    for place in places:
        files = getattr(open_data(tiny_run.recipe(cache, Path("unused"), **place), CPU).images, "files", ())
        assert files[0].is_relative_to(moved)
    places = [{"data_dir": "/nowhere"}, {"dataset": {"data_dir": "/nowhere"}}]
    for place in places:
        with pytest.raises(CacheError, match="/nowhere"):
            open_data(tiny_run.recipe(cache, Path("unused"), **place), CPU)
