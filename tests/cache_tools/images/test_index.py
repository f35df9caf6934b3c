"""The stored index of a folder: what it saves reading, and when it must not be believed."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from cache_tools.files import cache_home
from cache_tools.images import index, open_images
from cache_tools.images.folder import FolderImages
from cache_tools.images.image_set import sample_key
from cache_tools.images.index import FileColumn
from cache_tools.images.recipe import DatasetRecipe

Reads = list[str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """The names of the files that are read; no folder is too small for an index, and no file too young."""
    names: Reads = []
    examine: Callable[[Path], index._Content] = index._examine_file

    def counted(path: Path) -> index._Content:
        names.append(path.name)
        return examine(path)

    monkeypatch.setattr(index, "_examine_file", counted)
    monkeypatch.setattr(index, "YOUNG_NS", 0)
    monkeypatch.setattr(index, "INDEXED_FROM_FILES", 1)
    return names


def make_folder(root: Path, count: int = 6) -> Path:
    for number in range(count):
        path = root / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    (root / "train" / "a" / "notes.txt").write_text("no image")
    return root


def opened(root: Path, labels: Path | None = None) -> FolderImages:
    images = open_images(DatasetRecipe(name="folder", data_dir=root, test_split=None, labels=labels))
    assert isinstance(images, FolderImages)
    return images


def keys_of(images: FolderImages) -> dict[str, bytes]:
    return {path.name: key.tobytes() for path, key in zip(images.files, images.keys, strict=True)}


def test_only_what_changed_is_read_again(tmp_path: Path, reads: Reads) -> None:
    root = make_folder(tmp_path)
    first = opened(root)
    assert sorted(reads) == ["0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "notes.txt"]
    steps: list[tuple[Callable[[], object], list[str]]] = [
        (lambda: None, []),
        (lambda: os.utime(root / "train/a/0.png"), ["0.png"]),
        (lambda: Image.new("RGB", (9, 9)).save(root / "train/b/new.png"), ["new.png"]),
        (lambda: (root / "train/b/new.png").unlink(), []),
        (lambda: os.rename(root / "train/b/5.png", root / "train/a/moved.png"), ["moved.png"]),
        (lambda: os.rename(root / "train/a/moved.png", root / "train/b/5.png"), ["5.png"]),
    ]
    for change, expected in steps:
        change()
        reads.clear()
        again = opened(root)
        assert [name for name in reads if name != "notes.txt"] == expected
    assert keys_of(again) == keys_of(first)
    assert again.content_digest == first.content_digest


def test_a_change_that_keeps_size_and_time_is_seen(tmp_path: Path, reads: Reads) -> None:
    root = make_folder(tmp_path)
    opened(root)
    path = root / "train/a/0.png"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert keys_of(opened(root))["0.png"] == sample_key(bytes(data))


def test_a_small_folder_needs_no_index(tmp_path: Path, home: Path) -> None:
    root = make_folder(tmp_path)
    assert keys_of(opened(root)) == keys_of(opened(root))
    assert not (home / index.FOLDER).exists()


def test_young_files_are_read_again(tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path)
    monkeypatch.setattr(index, "YOUNG_NS", 3_600_000_000_000)
    opened(root)
    reads.clear()
    opened(root)
    assert len(reads) == 7


def test_hard_links_are_read_once(tmp_path: Path, reads: Reads) -> None:
    root = make_folder(tmp_path, 2)
    for number in range(50):
        os.link(root / "train/a/0.png", root / "train/b" / f"link{number}.png")
        os.link(root / "train/a/notes.txt", root / "train/b" / f"link{number}.txt")
    images = opened(root)
    assert len(images) == 52
    assert len(reads) == 3
    assert len(images.summary.left_out) == 51
    assert {key for name, key in keys_of(images).items() if name != "1.png"} == {keys_of(images)["0.png"]}


@pytest.mark.parametrize("damage", ["text", "other columns", "null", "short key", "twice", "folder", "fifo"])
def test_a_damaged_index_is_made_again(tmp_path: Path, reads: Reads, damage: str) -> None:
    root = make_folder(tmp_path)
    expected = keys_of(opened(root))
    [path] = (cache_home() / index.FOLDER).iterdir()
    stored = pl.read_parquet(path)
    path.unlink()
    if damage == "text":
        path.write_text("no parquet")
    elif damage == "folder":
        path.mkdir()
    elif damage == "fifo":
        os.mkfifo(path)
    else:
        key = pl.col("key")
        short = pl.when(pl.col("path") == b"a/0.png").then(pl.lit(b"short")).otherwise(key)
        {
            "other columns": stored.drop("size"),
            "null": stored.with_columns(pl.when(pl.col("path") == b"a/0.png").then(None).otherwise(key).alias("key")),
            "short key": stored.with_columns(short.alias("key")),
            "twice": pl.concat([stored, stored.head(1).with_columns(pl.lit(b"0" * 16).alias("key"))]),
        }[damage].write_parquet(path)
    reads.clear()
    assert keys_of(opened(root)) == expected
    assert len(reads) == 7
    if damage not in {"folder", "fifo"}:  # these are not ours to replace
        reads.clear()
        opened(root)
        assert reads == ["notes.txt"]


def test_sizes_are_stored_and_an_index_without_them_is_still_used(tmp_path: Path, reads: Reads) -> None:
    root = make_folder(tmp_path)
    Image.new("RGB", (30, 20)).save(root / "train/a/wide.jpg")
    first = opened(root)
    sizes = {path.name: tuple(size) for path, size in zip(first.files, first.header_sizes().tolist(), strict=True)}
    assert sizes == {"wide.jpg": (20, 30)} | {f"{number}.png": (8, 8) for number in range(6)}
    reads.clear()
    np.testing.assert_array_equal(opened(root).header_sizes(), first.sizes)
    [path] = (cache_home() / index.FOLDER).iterdir()
    pl.read_parquet(path).drop("height", "width").write_parquet(path)  # as version 0.1 wrote it
    without = opened(root)
    assert keys_of(without) == keys_of(first)
    assert not without.sizes.any()
    assert reads == ["notes.txt"] * 2


def test_without_a_writable_home_every_file_is_read(tmp_path: Path, reads: Reads, home: Path) -> None:
    home.write_text("a file where the home should be")
    root = make_folder(tmp_path)
    assert keys_of(opened(root)) == keys_of(opened(root))
    assert len(reads) == 14


def test_an_image_without_its_decoder_is_left_out(
    tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path)
    Image.new("RGB", (8, 8)).save(root / "train/a/lossy.webp")
    assert "lossy.webp" in keys_of(opened(root))
    monkeypatch.setattr(index, "is_decodable", lambda name: name.lower() != "webp")
    images = opened(root)
    assert "lossy.webp" not in keys_of(images)
    assert "a/lossy.webp" in images.summary.left_out


def test_a_table_of_labels_has_an_index_of_its_own(tmp_path: Path, reads: Reads) -> None:
    root = make_folder(tmp_path)
    table = root / "labels.csv"
    table.write_text("path,labels\na/0.png,cat\nb/1.png,dog\n")
    opened(root)
    opened(root, table)
    reads.clear()
    opened(root)
    opened(root, table)
    assert set(reads) == {"notes.txt"}
    assert len(list((cache_home() / index.FOLDER).iterdir())) == 2


def test_names_that_are_not_utf8(tmp_path: Path, reads: Reads) -> None:
    root = make_folder(tmp_path, 2)
    shutil.copy(root / "train/a/0.png", os.fsdecode(os.fsencode(root / "train/a") + b"/caf\xe9.png"))
    first = opened(root)
    reads.clear()
    again = opened(root)
    assert reads == ["notes.txt"]
    assert list(first.files) == list(again.files)
    assert os.fsencode(again.files[1].name) == b"caf\xe9.png"


def test_files_are_sorted_as_the_parts_of_their_paths(tmp_path: Path) -> None:
    names = ["a b/x", "a/b/y", "a/b!/z", "a/b", "a-b/x", "a/é/x", "a/Z", "a.b/x", "a/b0/x"]
    for name in names:
        path = tmp_path / "train" / "class" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    files = list(opened(tmp_path).files)
    assert files == sorted(files, key=lambda path: path.parts)


def test_a_column_of_files_is_a_sequence() -> None:
    names = ["a/1.png", "", "é/2.png", "b/c/3", os.fsdecode(b"caf\xe9")]
    column = FileColumn.of(Path("/root"), names)
    paths = [Path("/root") / name for name in names]
    assert list(column) == paths
    assert [column[row] for row in (-1, 0, 2)] == [paths[row] for row in (-1, 0, 2)]
    assert list(column[1:4]) == paths[1:4]
    assert list(column[np.array([4, 0])][::-1]) == [paths[0], paths[4]]
    assert list(pickle.loads(pickle.dumps(column))) == paths
    assert list(FileColumn.of(Path("/root"), [])) == []
    with pytest.raises(IndexError):
        column[5]
