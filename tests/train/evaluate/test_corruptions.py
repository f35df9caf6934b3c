"""Corrupted images are read from the right rows of the right file; anything else is a clear error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache_tools.errors import DataError
from tests.support import corrupted_folder
from train.evaluate.corruptions import CORRUPTIONS, KINDS, SEVERITIES, evenly_spaced, open_corrupted

LABELS = np.arange(40, dtype=np.int64) % 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corrupted_folder.write(tmp_path_factory.mktemp("corrupted"), LABELS)


def test_there_are_fifteen_corruptions_of_four_kinds() -> None:
    assert len(CORRUPTIONS) == 15
    assert [list(KINDS.values()).count(kind) for kind in ("noise", "blur", "weather", "digital")] == [3, 4, 4, 4]


@pytest.mark.parametrize("samples", [None, 40, 100, 13, 1])
@pytest.mark.parametrize("rows", [slice(None), slice(0, 5), slice(3, 9), slice(10, 10)])
def test_every_row_is_loaded_from_its_place(folder: Path, samples: int | None, rows: slice) -> None:
    opened = open_corrupted(folder, LABELS, samples)
    assert len(opened) == min(samples or 40, 40)
    assert np.array_equal(opened.labels, LABELS[opened.index])
    assert opened.image_size == (32, 32)
    for number, name in enumerate(CORRUPTIONS):
        for severity in SEVERITIES:
            pixels = opened.load(name, severity, rows)
            assert pixels.shape == (len(opened.index[rows]), 3, 32, 32)
            assert (pixels[:, 0] == number).all()
            assert (pixels[:, 1] == severity).all()
            assert (pixels[:, 2, 7, 9] == opened.index[rows]).all()
            assert np.array_equal(opened.loader(name, severity)(rows), pixels)


def test_images_are_evenly_spaced() -> None:
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, None).tolist() == [0, 1, 2]
    assert evenly_spaced(0, 5).tolist() == []


def test_an_index_gives_the_rows_in_the_test_split(folder: Path) -> None:
    opened = open_corrupted(folder, LABELS, 10, index=np.arange(40) * 3)
    assert opened.index.tolist() == [0, 12, 24, 36, 48, 60, 72, 84, 96, 108]


def test_labels_may_be_stored_once(tmp_path: Path) -> None:
    folder = corrupted_folder.write(tmp_path, LABELS)
    np.save(folder / "labels.npy", LABELS)
    assert np.array_equal(open_corrupted(folder, LABELS).labels, LABELS)


def test_opening_reads_no_pixels(folder: Path) -> None:
    opened = open_corrupted(folder, LABELS)
    assert all(isinstance(file, np.memmap) for file in opened._files.values())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = corrupted_folder.write(tmp_path, LABELS)
    (folder / "fog.npy").unlink()
    with pytest.raises(DataError, match=r"no fog\.npy"):
        open_corrupted(folder, LABELS)
    with pytest.raises(DataError, match="no such folder"):
        open_corrupted(folder / "nothing", LABELS)


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("labels.npy", np.roll(np.tile(LABELS, 5), 1), "200 of 200 differ, the first at row 0"),
        ("labels.npy", np.where(np.arange(200) == 77, 3, np.tile(LABELS, 5)), "1 of 200 differ.*row 77"),
        ("labels.npy", LABELS[:-1], "not the labels of the test images"),
        ("labels.npy", np.tile(LABELS, 5).astype(np.float32), "not the labels of the test images"),
        ("snow.npy", np.zeros((199, 32, 32, 3), np.uint8), "not corrupted copies"),
        ("snow.npy", np.zeros((200, 3, 32, 32), np.uint8), "not corrupted copies"),
        ("snow.npy", np.zeros((200, 32, 32, 3), np.float32), "not corrupted copies"),
        ("snow.npy", np.zeros((200, 16, 16, 3), np.uint8), "different sizes"),
        ("snow.npy", np.array({"an": "object"}), "cannot read"),
    ],
)
def test_wrong_arrays_are_errors(tmp_path: Path, name: str, array: np.ndarray, words: str) -> None:
    folder = corrupted_folder.write(tmp_path, LABELS)
    np.save(folder / name, array, allow_pickle=True)
    with pytest.raises(DataError, match=words):
        open_corrupted(folder, LABELS)


@pytest.mark.parametrize("size", [0, 60, 3000])
def test_a_truncated_file_is_an_error(tmp_path: Path, size: int) -> None:
    folder = corrupted_folder.write(tmp_path, LABELS)
    data = (folder / "frost.npy").read_bytes()
    (folder / "frost.npy").write_bytes(data[:size])
    with pytest.raises(DataError, match=r"frost\.npy"):
        open_corrupted(folder, LABELS)


def test_loaded_pixels_are_a_writable_copy(folder: Path) -> None:
    opened = open_corrupted(folder, LABELS)
    for rows in (slice(0, 5), slice(0, 10, 3)):
        pixels = opened.load("fog", 2, rows)
        pixels[:] = 77
        assert (opened.load("fog", 2, rows) != 77).all()
