"""Folders as an image source: order, decoding against torchvision, and hostile files."""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from torchvision import datasets, transforms

from cache_tools.errors import DataError
from cache_tools.images import encoded, open_images
from cache_tools.images import folder as image_folder
from cache_tools.images.check import check_images
from tests.support.pictures import photo, recipe_for

SIZE = 32


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train/{ant,Bee,cat}/… and test/… with a few ordinary photographs of several formats and shapes."""
    shapes = [(40, 60), (64, 33), (32, 32), (20, 90)]
    for split in ("train", "test"):
        for number, name in enumerate(("ant", "Bee", "cat")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i, (shape, suffix) in enumerate(zip(shapes, (".jpg", ".PNG", ".webp", ".bmp"), strict=True)):
                photo(*shape, seed=10 * number + i).save(folder / f"{i}{suffix}")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "ant" / ".hidden.jpg").write_text("not an image")
    return tmp_path


def test_a_part_of_a_folder_keeps_files_and_labels_together(root: Path) -> None:
    whole, part = open_images(recipe_for(root)), open_images(recipe_for(root), "train[1::4]")
    assert part.labels.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(part.load(slice(None)), whole.load(np.array([1, 5, 9])))
    np.testing.assert_array_equal(part.keys, whole.keys[1::4])


def test_order_labels_and_keys(root: Path) -> None:
    images = open_images(recipe_for(root))
    assert not images.resident
    assert images.image_size == (SIZE, SIZE)
    everything = images.load(slice(None))
    assert everything.shape == (12, 3, SIZE, SIZE)
    assert everything.dtype == np.uint8
    order = np.array([11, 0, 11, -1])
    np.testing.assert_array_equal(images.load(order), everything[order])
    with pytest.raises(IndexError):
        images.load(np.array([12]))
    assert images.class_names == ("Bee", "ant", "cat")
    assert images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert isinstance(images, image_folder.FolderImages)
    assert [path.name for path in images.files[:4]] == ["0.jpg", "1.PNG", "2.webp", "3.bmp"]
    data = (root / "train" / "ant" / "1.PNG").read_bytes()
    assert images.keys[5].tobytes() == hashlib.blake2b(data, digest_size=16).digest()
    assert open_images(recipe_for(root)).content_digest == images.content_digest
    moved = root.with_name("moved")
    root.rename(moved)
    assert open_images(recipe_for(moved)).content_digest == images.content_digest


def test_the_order_equals_torchvisions_image_folder(root: Path) -> None:
    (root / "train" / "cat" / "more").mkdir()
    photo(30, 30).save(root / "train" / "cat" / "more" / "9.png")
    reference = datasets.ImageFolder(str(root / "train"), allow_empty=True)
    images = open_images(recipe_for(root))
    assert isinstance(images, image_folder.FolderImages)
    ours = [(str(path), label) for path, label in zip(images.files, images.labels.tolist(), strict=True)]
    hidden = str(root / "train" / "ant" / ".hidden.jpg")
    assert ours == [sample for sample in reference.samples if sample[0] != hidden]


def test_decoding_equals_torchvisions_resize_and_centre_crop(root: Path) -> None:
    transform = transforms.Compose(
        [transforms.Resize(SIZE, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(SIZE)]
    )
    images = open_images(recipe_for(root))
    assert isinstance(images, image_folder.FolderImages)
    expected = [np.asarray(transform(Image.open(path).convert("RGB"))) for path in images.files]
    difference = images.load(slice(None)).astype(int) - np.stack(expected).transpose(0, 3, 1, 2)
    # PIL orders its two passes by cost, which differs between a crop and a whole image: other roundings
    assert np.abs(difference).max() <= 2
    assert np.abs(difference).mean() < 0.3


def test_classes_directly_in_data_dir_without_splits(root: Path) -> None:
    alone = open_images(recipe_for(root / "train", test_split=None))
    assert alone.content_digest == open_images(recipe_for(root)).content_digest
    with pytest.raises(DataError, match="without a folder train"):
        open_images(recipe_for(root / "train"))


def test_default_canvas(root: Path) -> None:
    images = open_images(recipe_for(root, image_size=None))
    assert images.load(slice(0, 2)).shape == (2, 3, 224, 224)


def test_opening_decodes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "decode_image", lambda *_: pytest.fail("decoded an image"))
    assert len(open_images(recipe_for(root))) == 12


# --- hostile files ---


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has a single byte of data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    header = chunk(b"IHDR", size + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def broken_bytes(kind: str, good: Path) -> bytes:
    data = good.read_bytes()
    return {
        "truncated jpeg": data[: len(data) // 2],
        "only a jpeg header": data[:30],
        "text": b"this is not an image\n" * 10,
        "zeros": bytes(1000),
        "html": b"<html><body>404</body></html>",
        "decompression bomb": png_header(60_000, 60_000),
        "short png": png_header(200, 200),
    }[kind]


KINDS = ["truncated jpeg", "only a jpeg header", "text", "zeros", "html", "decompression bomb", "short png"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_image_is_named(root: Path, kind: str, tolerant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a program whose libraries made PIL accept truncated images and images of any size."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    if tolerant:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    bad = root / "train" / "cat" / "1.jpg"
    bad.write_bytes(broken_bytes(kind, root / "train" / "cat" / "0.jpg"))
    images = open_images(recipe_for(root))
    with pytest.raises(DataError, match=str(bad)) as caught:
        images.load(slice(None))
    assert "replace the file" in str(caught.value).lower()
    assert tolerant == ImageFile.LOAD_TRUNCATED_IMAGES
    row = [str(path) for path in images.files].index(str(bad))  # type: ignore[attr-defined]
    others = np.delete(np.arange(len(images)), row)
    assert len(images.load(others)) == len(images) - 1


@pytest.mark.parametrize(
    "kind", ["empty", "loop", "broken link", "broken folder link", "pipe", "folder loop", "unreadable"]
)
def test_irregular_files_are_refused(root: Path, kind: str) -> None:
    bad = root / "train" / "cat" / "x.png"
    if kind == "empty":
        bad.touch()
    elif kind == "loop":
        bad.symlink_to(bad)
    elif kind == "broken link":
        bad.symlink_to(root / "nowhere.png")
    elif kind == "broken folder link":
        bad = root / "train" / "cat" / "more"
        bad.symlink_to(root / "nowhere")
    elif kind == "pipe":
        os.mkfifo(bad)  # reading it would wait for ever
    elif kind == "folder loop":
        bad = root / "train" / "cat" / "again"
        bad.symlink_to(root / "train")
    else:
        photo(32, 32).save(bad)
        bad.chmod(0)
        if os.access(bad, os.R_OK):
            pytest.skip("this user reads everything")
    with pytest.raises(
        DataError, match=str(bad) if kind in {"loop", "folder loop"} else str(bad.relative_to(root / "train"))
    ):
        check_images(open_images(recipe_for(root)))


def test_links_to_images_and_folders_are_followed(root: Path) -> None:
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    photo(32, 32, seed=77).save(elsewhere / "7.png")
    (root / "train" / "dog").symlink_to(elsewhere)
    images = open_images(recipe_for(root))
    assert images.class_names == ("Bee", "ant", "cat", "dog")
    assert len(images) == 13


def test_folders_without_a_dataset_are_refused(root: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_images(recipe_for(root / "missing"))
    with pytest.raises(DataError, match="without a folder val"):
        open_images(recipe_for(root), "val")
    (root / "flat").mkdir()
    with pytest.raises(DataError, match="no sub-folder"):
        open_images(recipe_for(root), "flat")
    photo(32, 32).save(root / "train" / "stray.png")
    with pytest.raises(DataError, match=r"the image stray\.png beside"):
        open_images(recipe_for(root))
    (root / "train" / "stray.png").unlink()
    (root / "train" / "lost").symlink_to(root / "unmounted")
    with pytest.raises(DataError, match="the broken link lost"):
        open_images(recipe_for(root))
    (root / "train" / "lost").unlink()
    (root / "train" / "zebra").mkdir()
    with pytest.raises(DataError, match=r"class folder without an image.*zebra"):
        open_images(recipe_for(root))


def test_a_file_that_changes_after_opening_is_refused(root: Path) -> None:
    images = open_images(recipe_for(root))
    photo(64, 33, seed=5).save(root / "train" / "ant" / "1.PNG")
    with pytest.raises(DataError, match=r"changed since.*1\.PNG"):
        images.load(np.array([5]))


def test_many_files_show_progress(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    monkeypatch.setattr("cache_tools.images.index.PROGRESS_FROM_FILES", 12)
    monkeypatch.setattr("cache_tools.images.index.Progress.advance", lambda self, count, note="": shown.append(count))
    open_images(recipe_for(root))
    assert sum(shown) == 13  # 12 images and a text
