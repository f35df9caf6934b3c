"""A folder of images gets the labels of a student by the names of its class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache_tools.errors import DataError
from train.evaluate.shifted import open_shifted

NAMES = ("t-shirt/top", "Ankle boot", "bag")


def picture(folder: Path, grey: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 40, 3), grey, np.uint8)).save(folder / f"{grey}.png")


def test_labels_follow_the_students_class_names(tmp_path: Path) -> None:
    picture(tmp_path / "ankle_boot", 10)
    picture(tmp_path / "BAG", 20)
    picture(tmp_path / "T Shirt_top", 30)
    picture(tmp_path / "T Shirt_top", 31)
    images = open_shifted(tmp_path, NAMES, (32, 32))
    assert images.class_names == NAMES
    assert images.image_size == (32, 32)
    grey = images.load(slice(None))[:, 0, 0, 0]
    assert dict(zip(grey.tolist(), images.labels.tolist(), strict=True)) == {10: 1, 20: 2, 30: 0, 31: 0}


def test_classes_may_be_missing(tmp_path: Path) -> None:
    picture(tmp_path / "bag", 20)
    assert open_shifted(tmp_path, NAMES, (32, 32)).labels.tolist() == [2]


def test_unknown_and_repeated_classes_are_errors(tmp_path: Path) -> None:
    picture(tmp_path / "bag", 20)
    picture(tmp_path / "sandal", 20)
    with pytest.raises(DataError, match=r"does not know these classes.*t-shirt/top.*found sandal"):
        open_shifted(tmp_path, NAMES, (32, 32))
    (tmp_path / "sandal").rename(tmp_path / "Bag")
    with pytest.raises(DataError, match="several folders of one class"):
        open_shifted(tmp_path, NAMES, (32, 32))


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_shifted(tmp_path / "nothing", NAMES, (32, 32))
