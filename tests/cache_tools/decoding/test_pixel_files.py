"""Pixel files give the pixels of decoding, are found by content, and are never believed when they are damaged."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_tools.decoding import packing, pixel_file
from cache_tools.decoding.packed import PackedImages
from cache_tools.decoding.packing import NoRoomError, find_packed, make_packed, pack_in_memory, packed_bytes
from cache_tools.decoding.pixel_file import open_pixel_file, pixel_files, read_picture
from cache_tools.decoding.service import DecodeService, service_for, start_loading
from cache_tools.errors import DataError, FormatError, StorageError
from cache_tools.images import open_images
from cache_tools.images.decode import PixelRules
from cache_tools.images.folder import FolderImages
from cache_tools.images.index import FileState
from cache_tools.views import ViewRecipe, load_each
from tests.support.pictures import photo, recipe_for

COUNT, BUDGET = 30, 10**8
NEVER = FileState(0, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many sizes; the last two files have the content of the first two."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(COUNT):
        file = root / "train" / f"class{number % 3}" / f"{number:03}.{('jpg', 'png')[number % 2]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        first = number % (COUNT - 2)
        photo(24 + 7 * (first % 6), 60 - 5 * (first % 5), first).save(file)
    return root


@pytest.fixture
def images(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderImages:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    images = open_images(recipe_for(root, test_split=None))
    assert isinstance(images, FolderImages)
    return images


def same_pixels(packed: PackedImages, images: FolderImages) -> None:
    for rows in (slice(None), slice(3, 9), np.array([5, 1, 1, 17, 2])):
        if packed.canvases:
            assert np.array_equal(packed.load(rows), images.load(rows))
        for one, other in zip(packed.pictures(rows), images.pictures(rows), strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize("canvases", [True, False])
@pytest.mark.parametrize("alone", [1 << 40, 0])
def test_pixels_are_those_of_decoding(
    images: FolderImages, canvases: bool, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one thread and in several; every content is stored once."""
    monkeypatch.setattr("cache_tools.decoding.pixel_file._READ_ALONE", alone)
    assert find_packed(images, canvases=canvases) is None
    packed = make_packed(images, canvases=canvases, budget=BUDGET)
    same_pixels(packed, images)
    assert packed.file.path.stat().st_size == packed_bytes(images, canvases=canvases)
    assert len(packed.file.index.keys) == COUNT - 2
    found = find_packed(images, canvases=canvases)
    assert found is not None
    assert found.file.path == packed.file.path
    assert find_packed(images, canvases=not canvases) is None


def test_pictures_in_memory_are_those_of_decoding(images: FolderImages, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_in_memory(images)
    assert packed is not None
    same_pixels(packed, images)
    assert not pixel_files().path.exists(), "nothing is on the disk"
    monkeypatch.setattr(packing, "packed_bytes", lambda *_, **__: 1000)
    assert pack_in_memory(images) is None


def test_parts_of_a_split_use_the_file_of_the_whole(images: FolderImages) -> None:
    whole = make_packed(images, canvases=False, budget=BUDGET)
    part = images.subset(np.array([7, 3, 21, 22]))
    found = find_packed(part, canvases=False)
    assert found is not None
    assert found.file.path == whole.file.path
    for one, other in zip(found.pictures(slice(None)), part.pictures(slice(None)), strict=True):
        assert np.array_equal(one, other)
    for one, other in zip(
        whole.subset(part.labels * 0 + 4).pictures(slice(None)), images.pictures(np.full(4, 4)), strict=True
    ):
        assert np.array_equal(one, other)
    whole.file.path.unlink()
    make_packed(part, canvases=False, budget=BUDGET)
    assert find_packed(images, canvases=False) is None, "a part does not hold the whole"


def test_other_pixels_are_in_other_files(images: FolderImages, monkeypatch: pytest.MonkeyPatch) -> None:
    make_packed(images, canvases=True, budget=BUDGET)
    others = [
        images.at(24),
        images.at(32, "bilinear"),
        replace(images, rules=PixelRules(background=(1, 2, 3))),
        replace(images, keys=images.keys[:, ::-1].copy()),
    ]
    for other in others:
        assert find_packed(other, canvases=True) is None
    monkeypatch.setattr(packing, "decoder_versions", lambda: {"pillow": "0"})
    assert find_packed(images, canvases=True) is None


def damaged_header(data: bytearray) -> None:
    data[20] ^= 1


def damaged_index(data: bytearray) -> None:
    data[-1] ^= 1


def cut(data: bytearray) -> None:
    del data[-1:]


def empty(data: bytearray) -> None:
    data.clear()


def nested(data: bytearray) -> None:
    data[8:4096] = (4084).to_bytes(4, "little") + b"[" * 4084


def endless(data: bytearray) -> None:
    data[12:4096] = re.sub(rb'"count": [0-9]+', b'"count": 1e999', data[12:4096])[:4084]


def of_another_version(data: bytearray) -> None:
    data[12:4096] = data[12:4096].replace(b'"version": 1', b'"version": 7')


@pytest.mark.parametrize("damage", [damaged_header, damaged_index, cut, empty, nested, endless, of_another_version])
def test_a_damaged_file_is_made_again(
    images: FolderImages, damage: Callable[[bytearray], None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_packed(images, canvases=True, budget=BUDGET).file.path
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"damaged pixel file.*Remove it"):
        open_pixel_file(path.name)
    capsys.readouterr()
    assert find_packed(images, canvases=True) is None
    assert "warning: a damaged pixel file" in capsys.readouterr().err
    same_pixels(make_packed(images, canvases=True, budget=BUDGET), images)


@pytest.mark.parametrize("canvases", [True, False])
def test_changed_pixels_are_refused(images: FolderImages, canvases: bool) -> None:
    """Also where another process reads them; and a file that is cut while it is open."""
    packed = make_packed(images, canvases=canvases, budget=BUDGET)
    path, place = packed.file.path, packed.place_in_file(4)
    with path.open("r+b") as file:
        file.seek(place.start + 11)
        byte = file.read(1)[0]
        file.seek(place.start + 11)
        file.write(bytes([byte ^ 16]))
    with pytest.raises(DataError, match=r"damaged pixel file.*other pixels.*Remove it"):
        packed.load(slice(None)) if canvases else packed.pictures(slice(None))
    if not canvases:
        with pytest.raises(DataError, match="other pixels"):
            read_picture(place, NEVER)
        _, state = read_picture(packed.place_in_file(5), NEVER)
        read_picture(place, state)  # the parent knows that it was checked
    os.truncate(path, 5000)
    with pytest.raises(DataError, match="shorter file"):
        packed.load(slice(6, 9)) if canvases else packed.pictures(slice(6, 9))


def test_links_are_not_followed(images: FolderImages, tmp_path: Path) -> None:
    path = make_packed(images, canvases=True, budget=BUDGET).file.path
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    assert find_packed(images, canvases=True) is None
    with pytest.raises(FormatError, match="link"):
        make_packed(images, canvases=True, budget=BUDGET)
    assert elsewhere.read_bytes() == before
    assert path.is_symlink()


WRITER = """
import sys
import numpy as np
from cache_tools.decoding.pixel_file import write_pixel_file

def pictures():
    for number in range(5):
        if number == 3:
            print("writing", flush=True)
            sys.stdin.read()
        yield np.zeros((9, 9, 3), np.uint8)

keys = np.arange(80, dtype=np.uint8).reshape(5, 16)
write_pixel_file(sys.argv[1], {"kind": "pictures"}, keys, pictures(), limit=10**6)
"""


@pytest.mark.medium
def test_a_killed_process_leaves_nothing_that_is_used(images: FolderImages, monkeypatch: pytest.MonkeyPatch) -> None:
    name = make_packed(images, canvases=False, budget=BUDGET).file.path.name
    pixel_files().remove(name)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, name], stdin=-1, stdout=-1)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    writer.send_signal(signal.SIGKILL)
    with writer:
        pass
    (left,) = [each for each in pixel_files().names() if each != ".lock"]
    assert left.endswith(".partial")
    assert find_packed(images, canvases=False) is None
    make_packed(images, canvases=False, budget=BUDGET)
    assert pixel_files().exists(left), "a process may still be writing"
    pixel_files().remove(name)
    os.utime(pixel_files().path / left, (time.time() - 61,) * 2)
    same_pixels(make_packed(images, canvases=False, budget=BUDGET), images)
    assert not pixel_files().exists(left)


def test_two_at_once_make_one_file(
    images: FolderImages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second one waits, and uses the file of the first. Locks are of open files, so threads stand for processes."""
    made = []
    original = pixel_file.write_pixel_file

    def write(name: str, *arguments: Any, **options: Any) -> None:
        made.append(name)
        time.sleep(0.3)
        original(name, *arguments, **options)

    monkeypatch.setattr(packing, "write_pixel_file", write)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: make_packed(images, canvases=False, budget=BUDGET), range(2)))
    assert len(made) == 1
    for packed in both:
        same_pixels(packed, images)
    assert "waiting for another process" in capsys.readouterr().err


def test_too_little_room_leaves_nothing(images: FolderImages, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(budget: int, reason: str, *, canvases: bool = False) -> None:
        before = pixel_files().names() if pixel_files().path.is_dir() else []
        with pytest.raises(NoRoomError, match=reason):
            make_packed(images, canvases=canvases, budget=budget)
        assert set(pixel_files().names()) - {".lock"} == set(before) - {".lock"}

    size = packed_bytes(images, canvases=False)
    refused(size - 1, "--pixel-disk 1MB would keep them")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": size - 1}))
        refused(size, "are free on the disk")
    with monkeypatch.context() as patch:
        patch.setattr(packing, "packed_bytes", lambda *_, **__: 1000)
        refused(size - 1, "take more than --pixel-disk")

    def fill_the_disk(name: str, settings: Any, keys: Any, pictures: Iterator[Any], *, limit: int) -> None:
        def first() -> Iterator[Any]:
            yield next(pictures)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        original(name, settings, keys, first(), limit=limit)

    original = pixel_file.write_pixel_file
    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_pixel_file", fill_the_disk)
        refused(size, "was full")
    make_packed(images, canvases=False, budget=size)
    refused(size + 1000, "other pixel files take", canvases=True)


def test_a_home_that_cannot_be_written_is_an_error(images: FolderImages, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "pixels").write_text("a file in the way")
    assert find_packed(images, canvases=True) is None
    with pytest.raises(StorageError):
        make_packed(images, canvases=True, budget=BUDGET)


@pytest.mark.medium
def test_processes_crop_the_pictures_of_a_file(images: FolderImages) -> None:
    """The decode service reads them from there, twice, so that the second time nothing is checked again."""
    packed = make_packed(images, canvases=False, budget=BUDGET)
    mix = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    ops = [{"op": "random-resized-crop", "size": 20}, "flip"]
    views = ViewRecipe.model_validate({"version": 2, "ops": ops, "mix": mix}).over(COUNT)
    service = DecodeService(1)
    try:
        for view in (0, 1):
            rows = np.array([4, 29, 0, 4, 11])
            (expected,) = load_each(images, rows, rows, [(views, view)])
            (found,) = start_loading(service, packed, rows, rows, [(views, view)], pin=False)()
            assert torch.equal(found, expected)
        assert service._states_of(packed)[4].any(), "its state was reported"
        memory = pack_in_memory(images)
        assert memory is not None
        (found,) = start_loading(service, memory, rows, rows, [(views, 1)], pin=False)()
        assert torch.equal(found, expected)
        packed.file.path.unlink()
        make_packed(images, canvases=False, budget=BUDGET)
        lost = replace(packed)  # whose file is not the one that is there now
        (found,) = start_loading(service, lost, rows, rows, [(views, 1)], pin=False)()
        assert torch.equal(found, expected), "an open file stays what it was"
    finally:
        service.close()
    assert service_for(packed, 10**6) is not None
    assert service_for(make_packed(images, canvases=True, budget=BUDGET), 10**6) is None, "only reads"
