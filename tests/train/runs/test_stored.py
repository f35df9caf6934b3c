"""Run folders are read back as they were written, and anything else is a clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cache_tools.errors import CacheError, DataError, NotFoundError, RecipeError, WeightsError
from tests.support import tiny_run
from train.checkpoints import read_card
from train.run import train_student
from train.runs.stored import data_name, open_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stored")
    pictures = tiny_run.write_pictures(root / "pictures", train=24, test=9)
    cache = tiny_run.write_cache(root / "tiny.zarr", pictures)
    recipe = tiny_run.recipe(cache, root / "run", epochs=1, compare_with_labels=True)
    train_student(recipe)
    return root / "run"


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_run_has_its_recipe_images_and_checkpoints(trained: Path) -> None:
    run, which = open_run(trained)
    assert which is None
    assert run.recipe.student == "resnet8"
    assert run.checkpoints() == ["last", "best"]
    assert run.manifest is not None
    assert run.cache == trained.parent / "tiny.zarr"
    assert run.labels_only() == trained / "labels-only"
    test = run.open_test(read_card(run.checkpoint("last")))
    assert (test.split, len(test), test.class_names) == ("test", 9, tiny_run.CLASSES)
    assert len(run.open_test(read_card(run.checkpoint("last")), "train")) == 24


def test_the_cache_may_have_been_deleted(copy: Path) -> None:
    record = json.loads((copy / "cache.json").read_text())
    (copy / "cache.json").write_text(json.dumps(record | {"path": "/nowhere"}))
    run, _ = open_run(copy)
    assert len(run.open_test(read_card(run.checkpoint("best")))) == 9


def test_a_checkpoint_file_opens_its_run(trained: Path) -> None:
    run, which = open_run(trained / "best.safetensors")
    assert (run.folder, which) == (trained, "best")


def test_a_run_on_labels_alone_has_no_teachers(trained: Path) -> None:
    run, _ = open_run(trained / "labels-only")
    assert run.manifest is None
    assert run.labels_only() is None
    assert run.dataset.name == "folder"


def test_errors_say_what_is_missing(copy: Path, tmp_path: Path) -> None:
    run, _ = open_run(copy)
    with pytest.raises(WeightsError, match=r"no 'ema' checkpoint.*found last, best.*ema_decay"):
        run.checkpoint("ema")
    with pytest.raises(RecipeError, match="no such checkpoint"):
        run.checkpoint("first")
    (copy / "last.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no 'last' checkpoint.*to the end"):
        run.checkpoint("last")
    with pytest.raises(NotFoundError, match="found nothing"):
        open_run(tmp_path / "nothing")
    with pytest.raises(NotFoundError, match=r"no recipe\.yaml"):
        open_run(tmp_path)


def test_damaged_records_are_errors(copy: Path) -> None:
    (copy / "cache.json").write_text("{}")
    with pytest.raises(CacheError, match="damaged record of the cache"):
        open_run(copy)
    (copy / "cache.json").unlink()
    with pytest.raises(NotFoundError, match="does not record its cache"):
        open_run(copy)
    (copy / "recipe.yaml").write_text("epochs: [1")
    with pytest.raises(RecipeError, match="damaged recipe"):
        open_run(copy)


def test_test_images_get_the_labels_of_the_student(trained: Path, tmp_path: Path) -> None:
    run, _ = open_run(trained)
    card = read_card(run.checkpoint("last"))
    plain = run.open_test(card)
    turned = run.open_test(card.model_copy(update={"class_names": ("red", "white", "green", "blue")}))
    assert [turned.class_names[label] for label in turned.labels] == [plain.class_names[x] for x in plain.labels]
    with pytest.raises(DataError, match=r"classes that training does not know.*red.*found blue, green"):
        run.open_test(card.model_copy(update={"class_names": ("red", "yellow")}))
    with pytest.raises(DataError, match="image folder not found"):
        run.open_test(card, data_dir=tmp_path)


# What the images are called


def named(run: Path, **changes: Any) -> str:
    """`data_name` of a run whose cache has another name or dataset."""
    record = json.loads((run / "cache.json").read_text())
    record["manifest"] |= changes
    (run / "cache.json").write_text(json.dumps(record))
    return data_name(run, "default")


def test_the_images_are_called_after_the_cache(copy: Path) -> None:
    assert named(copy, name="photos") == "photos"
    assert named(copy, name="flowers.v2") == "flowers.v2"
    assert named(copy, name="digits") == "pictures", "a folder that was built with the recipe digits"
    assert named(copy, name="cifar10", dataset={"name": "fashion-mnist"}) == "fashion-mnist"
    assert named(copy, name="cifar10", dataset={"name": "cifar10"}) == "cifar10"


def test_the_images_of_a_run_on_labels_alone_are_called_after_the_dataset(copy: Path) -> None:
    twin = copy / "labels-only"
    assert data_name(twin, "default") == "pictures"
    (twin / "recipe.yaml").unlink()
    assert data_name(twin, "default") == "default"
    identity = json.loads((twin / "run.json").read_text())
    identity["recipe"]["dataset"] = {"name": "cifar100"}
    (twin / "run.json").write_text(json.dumps(identity))
    assert data_name(twin, "default") == "cifar100"
    (twin / "run.json").unlink()
    assert data_name(twin, "default") == "default"
