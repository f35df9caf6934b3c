"""A folder with a table of labels: which images it has, their order and identity, and what is refused."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache_tools.alignment import aligned
from cache_tools.errors import DataError, MismatchError
from cache_tools.images import open_images
from cache_tools.images.classes import missing_classes, with_classes
from cache_tools.images.recipe import DatasetRecipe
from tests.support import multilabel


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return multilabel.write_squares(tmp_path / "squares", train=12, test=5)


def table(root: Path) -> list[list[str]]:
    with (root / "labels.csv").open() as file:
        return list(csv.reader(file))


def rewrite(root: Path, rows: list[list[str]]) -> None:
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def recipe(root: Path, **changes: Any) -> DatasetRecipe:
    return DatasetRecipe.model_validate(multilabel.dataset(root).model_dump() | changes)


def test_labels_are_those_of_the_table(root: Path) -> None:
    head, *rows = table(root)
    for split, count in (("train", 12), ("test", 5)):
        images = open_images(recipe(root), split)
        assert images.multi_label
        assert images.identity().multi_label
        assert images.labels.shape == (count, 4)
        assert images.labels.dtype == np.uint8
        assert images.class_names == tuple(head[2:])
        assert images.labels.tolist() == [list(map(int, row[2:])) for row in rows if row[1] == split]
        pixels = images.load(np.array([3]))[0]
        for number, colour in enumerate(multilabel.COLOURS.values()):
            has = bool((pixels.transpose(1, 2, 0) == colour).all(axis=2).any())
            assert has or not images.labels[3, number]


def test_a_part_keeps_its_labels(root: Path) -> None:
    whole = open_images(recipe(root))
    part = open_images(recipe(root), "train[::3]")
    assert part.labels.tolist() == whole.labels[::3].tolist()


def test_an_order_of_classes_rearranges_the_labels(root: Path) -> None:
    plain = open_images(recipe(root))
    order = ("yellow", "blue", "green", "red")
    other = open_images(recipe(root, class_order=order))
    assert other.class_names == order
    assert other.labels.tolist() == plain.labels[:, ::-1].tolist()
    assert other.content_digest != plain.content_digest


def test_the_identity_sees_labels_and_not_the_order_of_rows(root: Path) -> None:
    before = open_images(recipe(root)).content_digest
    head, *rows = table(root)
    rewrite(root, [head, *reversed(rows)])
    assert open_images(recipe(root)).content_digest == before
    rows[4][3] = str(1 - int(rows[4][3]))
    rewrite(root, [head, *rows])
    assert open_images(recipe(root)).content_digest != before


def test_each_split_may_have_a_table_of_its_own(root: Path) -> None:
    expected = open_images(recipe(root), "test").labels
    head, *rows = table(root)
    for split in ("train", "test"):
        rows_of = [[row[0], *row[2:]] for row in rows if row[1] == split]
        with (root / split / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([[head[0], *head[2:]], *rows_of])
    (root / "labels.csv").unlink()
    (root / "test" / "notes.txt").write_text("not an image")
    Image.new("RGB", (8, 8)).save(root / "test" / "unlisted.png")
    images = open_images(recipe(root), "test")
    assert images.labels.tolist() == expected.tolist()
    contents = images.folder_contents()
    assert contents is not None
    assert set(contents["left_out"]) == {"notes.txt", "unlisted.png"}, "the table is not one of them"


def test_images_may_be_anywhere_below_data_dir(root: Path) -> None:
    head, *rows = table(root)
    rewrite(root, [["path", *head[2:]], *[[f"{row[1]}/{row[0]}", *row[2:]] for row in rows]])
    images = open_images(recipe(root, split="all", test_split=None))
    assert len(images) == 17


def test_a_table_that_does_not_tell_two_splits_apart_is_refused(root: Path) -> None:
    rewrite(root, [[row[0], *row[2:]] for row in table(root)])
    with pytest.raises(DataError, match=r"does not tell them apart.*expected a column `split`"):
        open_images(recipe(root))


def test_missing_images_are_counted_and_named(root: Path) -> None:
    for number in (2, 7):
        (root / "train" / f"{number:03}.png").unlink()
    with pytest.raises(DataError, match=r"2 images of a table of labels are missing.*no 002.png, 007.png"):
        open_images(recipe(root))


def test_files_that_are_not_listed_are_left_out_with_a_word(root: Path) -> None:
    shutil.copy(root / "train" / "000.png", root / "train" / "more.png")
    (root / "train" / "readme.txt").write_text("About these images.")
    images = open_images(recipe(root))
    assert len(images) == 12
    (note,) = images.notes()
    assert "2 files of 14 left out" in note
    assert "1 not in the table of labels (more.png)" in note
    assert "readme.txt" in note


def test_listed_files_that_are_no_images_are_refused(root: Path) -> None:
    (root / "train" / "about.txt").write_text("About these images.")
    rewrite(root, [*table(root), ["about.txt", "train", "1", "0", "0", "0"]])
    with pytest.raises(DataError, match=r"files in a table of labels that are no images.*about.txt: "):
        open_images(recipe(root))


def test_a_test_split_is_matched_by_class_names(root: Path) -> None:
    test = open_images(recipe(root, class_order=("yellow", "blue", "green", "red")), "test")
    matched = with_classes(test, multilabel.CLASSES)
    assert matched.labels.tolist() == open_images(recipe(root), "test").labels.tolist()
    with pytest.raises(DataError, match=r"classes that training does not know.*yellow"):
        with_classes(test, ("red", "green", "blue"))
    more = with_classes(matched, (*multilabel.CLASSES, "black"))
    assert missing_classes(more)[-1] == "black"


class Cached:
    """The samples of a cache, as the alignment sees them."""

    def __init__(self, images: Any) -> None:
        from types import SimpleNamespace

        self.recipe = SimpleNamespace(dataset=images.identity())
        self.num_samples, self.class_names = len(images), images.class_names
        self.labels, self.sample_keys = images.labels, images.keys


def test_renamed_files_are_put_into_the_order_of_the_cache(root: Path) -> None:
    images = open_images(recipe(root))
    cache: Any = Cached(images)
    head, *rows = table(root)
    for row in rows:
        if row[1] == "train":
            (root / "train" / row[0]).rename(root / "train" / f"{99 - int(row[0][:3]):03}-.png")
            row[0] = f"{99 - int(row[0][:3]):03}-.png"
    rewrite(root, [head, *rows])
    other = open_images(recipe(root))
    assert other.keys.tolist() == images.keys[::-1].tolist()
    assert aligned(cache, other).labels.tolist() == images.labels.tolist()
    row = next(row for row in rows if row[1] == "train")
    row[2:] = ["0", "0", "0", "0"] if "1" in row[2:] else ["1", "0", "0", "0"]
    rewrite(root, [head, *rows])
    with pytest.raises(MismatchError, match="other labels of 1 samples, first at sample 0"):
        aligned(cache, open_images(recipe(root)))


def test_labels_are_for_folders() -> None:
    with pytest.raises(ValueError, match="labels is for folders only"):
        DatasetRecipe(name="digits", labels=Path("labels.csv"))
