"""Class names: files of them, the orders that people sort them in, and test splits with other classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache_tools.errors import DataError, RecipeError
from cache_tools.images import open_images
from cache_tools.images.class_names import ORDERS, arrange, names_in, read_names
from cache_tools.images.classes import missing_classes, missing_notes, shared_notes, with_classes
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import DatasetRecipe
from tests.support import tiny_run

KEY = "dataset.class_order"


def write_split(root: Path, **counts: int) -> Path:
    """CLASS → number of images below `root`; 0 makes an empty folder. Every image of a class has its own grey."""
    for level, (name, count) in enumerate(counts.items()):
        folder = root / name.replace("__", " ")
        folder.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(np.full((8, 8, 3), 20 * level + number, np.uint8)).save(folder / f"{number}.png")
    return root


def open_split(root: Path, split: str = "train", **fields: Any) -> ImageSet:
    return open_images(DatasetRecipe(name="folder", data_dir=root, image_size=8, **fields), split)


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("sorted", ("10", "2", "B", "a", "a10", "a9")),
        ("natural", ("2", "10", "a", "a9", "a10", "B")),
        ("case-blind", ("10", "2", "a", "a10", "a9", "B")),
        ("reversed", ("a9", "a10", "a", "B", "2", "10")),
    ],
)
def test_orders(order: str, names: tuple[str, ...]) -> None:
    assert ORDERS[order](("a9", "B", "2", "a", "10", "a10")) == names


def test_the_natural_order_is_timms() -> None:
    from timm.utils.misc import natural_key

    names = ("n10", "n9", "Img2.b", "img2.a", "x1y10", "x1y9", "007", "7", "zebra", "Ant")
    assert ORDERS["natural"](names) == tuple(sorted(sorted(names), key=natural_key))


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (["cat", "dog"], ("cat", "dog")),
        ({"dog": 1, "cat": 0}, ("cat", "dog")),
        ({"1": "dog", "0": "cat"}, ("cat", "dog")),
        ({0: "0", 2: "2", 1: "10"}, ("0", "10", "2")),  # number → name, though the names are numbers too
        ({"0": 0, "2": 2, "10": 1}, ("0", "10", "2")),  # name → number
        ({"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}, ("n01440764", "n01443537")),
        ({"cat": 1, "dog": 2}, None),
        ({"cat": 0, "dog": 0}, None),
        ({"cat": True}, None),
        ({"a": "b"}, None),
        ([1, 2], None),
        ([], None),
        ({}, None),
        ("cat", None),
        (None, None),
    ],
)
def test_names_as_libraries_store_them(value: Any, names: tuple[str, ...] | None) -> None:
    assert names_in(value) == names


def test_a_file_of_names(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_bytes("\ufeffgreat white shark\r\n7\r\nécu \r\n\r\n".encode())
    assert read_names(str(file), where=KEY) == ["great white shark", "7", "écu"]
    (tmp_path / "c.json").write_text(json.dumps({"dog": 1, "cat": 0}))
    assert read_names(str(tmp_path / "c.json"), where=KEY) == ("cat", "dog")
    assert read_names("natural", where=KEY, orders=("natural",)) == "natural"
    assert read_names([7, "cat"], where=KEY) == ["7", "cat"]
    assert read_names(None, where=KEY) is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"cat\n\ndog\n", "line 2 is empty"),
        (b" \n", "an empty file"),
        ("é".encode("latin-1"), "cannot read the class names.*UTF-8"),
        (None, "no such file of class names"),
    ],
)
def test_a_bad_file_of_names_is_refused(tmp_path: Path, content: bytes | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(RecipeError, match=rf"{problem}"):
        read_names(str(tmp_path / "classes.txt"), where=KEY)
    (tmp_path / "c.json").write_text('{"cat": 1}')
    with pytest.raises(RecipeError, match=r"no class names in the JSON file.*c\.json"):
        read_names(str(tmp_path / "c.json"), where=KEY)


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("sorted", ("10", "2", "B", "a")),
        ("natural", ("2", "10", "a", "B")),
        (["a", "2", "B", 10], ("a", "2", "B", "10")),
    ],
)
def test_class_order_numbers_the_labels_of_a_folder(tmp_path: Path, order: Any, names: tuple[str, ...]) -> None:
    """The same files in the order of the classes, with labels that follow it."""
    write_split(tmp_path / "train", **{"2": 1, "10": 2, "a": 3, "B": 1})
    images = open_split(tmp_path, class_order=order)
    assert images.class_names == names
    counts = {"2": 1, "10": 2, "a": 3, "B": 1}
    assert np.bincount(images.labels).tolist() == [counts[name] for name in names]
    files: Any = images
    assert [path.parent.name for path in files.files] == [names[label] for label in images.labels]


def test_the_order_is_part_of_the_identity_and_old_identities_stay(tmp_path: Path) -> None:
    write_split(tmp_path / "train", **{"2": 1, "10": 2})
    plain, natural = open_split(tmp_path), open_split(tmp_path, class_order="natural")
    assert plain.content_digest != natural.content_digest
    assert plain.content_digest == open_split(tmp_path, class_order=["10", "2"]).content_digest
    stored = DatasetRecipe(name="folder", data_dir=tmp_path).model_dump(mode="json")
    assert "class_order" not in stored


def test_a_file_is_read_when_the_recipe_is_loaded(tmp_path: Path) -> None:
    """So a cache or a run that stores the recipe does not need the file again."""
    (tmp_path / "order.txt").write_text("cat\nant\n")
    recipe = DatasetRecipe(name="folder", data_dir=tmp_path, class_order=str(tmp_path / "order.txt"))
    assert recipe.model_dump(mode="json")["class_order"] == ["cat", "ant"]
    assert DatasetRecipe.model_validate_json(recipe.model_dump_json()) == recipe
    with pytest.raises(ValueError, match="class_order is for folders only, not for digits"):
        DatasetRecipe(name="digits", class_order="natural")


def test_a_list_must_name_the_training_classes() -> None:
    names = ("ant", "bee", "cat")
    with pytest.raises(DataError, match=r"found not listed: cat; without a folder: dog\."):
        arrange(names, ("ant", "bee", "dog"))
    with pytest.raises(DataError, match=r"found twice: ant\."):
        arrange(names, ("ant", "bee", "cat", "ant"))
    assert arrange(("bee", "eel", "ant"), ("cat", "ant", "bee"), complete=False) == ("ant", "bee", "eel")


@pytest.mark.parametrize("gone", ["ant", "cat", "elk"])
def test_a_test_split_may_lack_a_class(tmp_path: Path, gone: str) -> None:
    """Labels follow the names, whether the class is missing or its folder is empty."""
    names = ("ant", "bee", "cat", "dog", "elk")
    write_split(tmp_path / "train", **dict.fromkeys(names, 2))
    write_split(tmp_path / "lacking", **{name: 3 for name in names if name != gone})
    write_split(tmp_path / "empty", **{name: 0 if name == gone else 3 for name in names})
    for split in ("lacking", "empty"):
        test = with_classes(open_split(tmp_path, split), open_split(tmp_path).class_names)
        assert test.class_names == names
        files: Any = test
        assert [names[label] for label in test.labels] == [path.parent.name for path in files.files]
        assert len(test) == 12
        assert missing_classes(test) == (gone,)
        assert missing_notes(test) == (f"no test images of: {gone}",)
        assert missing_notes(open_split(tmp_path), test) == (f"no test images of: {gone} in {split}",)


def test_classes_may_be_in_another_order(tmp_path: Path) -> None:
    write_split(tmp_path / "test", a=1, b=2, c=3)
    test = with_classes(open_split(tmp_path, "test"), ("c", "b", "z", "a"))
    assert test.labels.tolist() == [3, 1, 1, 0, 0, 0]
    assert missing_notes(test) == ("no test images of: z",)
    assert missing_notes(open_split(tmp_path, "test")) == ()


def test_a_class_that_training_does_not_know_is_refused(tmp_path: Path) -> None:
    """Unless its folder is empty: then it has no images that could be judged wrongly."""
    write_split(tmp_path / "train", ant=1, bee=1)
    write_split(tmp_path / "test", ant=1, koala=2, Bee=1)
    write_split(tmp_path / "harmless", ant=1, koala=0)
    with pytest.raises(
        DataError,
        match=r"the test split has classes that training does not know \(folder, split test\); "
        r"expected some of 2 classes: ant, bee; found Bee, koala\. Rename or remove their folders",
    ):
        with_classes(open_split(tmp_path, "test"), ("ant", "bee"))
    test = with_classes(open_split(tmp_path, "harmless"), ("ant", "bee"))
    assert test.labels.tolist() == [0]


def test_long_notes_are_cut(tmp_path: Path) -> None:
    write_split(tmp_path / "test", a=1)
    test = with_classes(open_split(tmp_path, "test"), ("a", *map(str, range(12))))
    assert missing_notes(test) == ("no test images of: 0, 1, 2, 3, 4, 5, 6, 7 and 4 more",)


def test_empty_folders_are_an_error_in_training_only(tmp_path: Path) -> None:
    write_split(tmp_path / "train", ant=1, bee=0)
    write_split(tmp_path / "test", ant=0, bee=0)
    with pytest.raises(DataError, match=r"class folder without an image.*bee.*Fill it, or remove it"):
        open_split(tmp_path)
    with pytest.raises(DataError, match=r"no image in any class folder.*found 2 classes: ant, bee"):
        open_split(tmp_path, "test")
    assert len(open_images(DatasetRecipe(name="folder", data_dir=tmp_path, split="other"), "train")) == 1


def test_test_images_that_are_training_images_are_counted(tmp_path: Path) -> None:
    tiny_run.write_pictures(tmp_path, train=12, test=6)
    recipe = tiny_run.dataset(tmp_path)
    train, test = open_images(recipe), open_images(recipe, "test")
    assert shared_notes(train, test) == ()
    (tmp_path / "test" / "red" / "copy.png").write_bytes((tmp_path / "train" / "blue" / "000.png").read_bytes())
    (note,) = shared_notes(train, open_images(recipe, "test"))
    assert note == "1 of 7 images of the test split test are also training images, so its figures are too good"
    parts = [open_images(recipe, part) for part in ("train[:75%]", "train[50%:]", "train[9:]")]
    (note,) = shared_notes(*parts)
    assert note.startswith("3 of 6 images of the test split train[50%:]")
