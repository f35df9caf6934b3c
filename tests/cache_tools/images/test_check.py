"""The check of all images: every damaged one is listed at once, `skip` leaves them out, and outcomes are remembered."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from cache_tools.errors import DataError
from cache_tools.files import cache_home
from cache_tools.images import check, open_images
from cache_tools.images.check import check_images, check_new_images, findings, frame_notes
from cache_tools.images.decode import Finding, PixelRules, examine_image
from cache_tools.images.folder import FolderImages
from cache_tools.images.index import read_image
from tests.cache_tools.images.test_decode import deep_colour_png
from tests.support.pictures import photo, recipe_for


def encoded(kind: str, seed: int = 0, **options: object) -> bytes:
    buffer = io.BytesIO()
    photo(40, 36, seed).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    check._memory.cache_clear()
    return tmp_path / "home"


def pictures(root: Path) -> Path:
    """Five pictures of three classes in each split."""
    for split in ("train", "test"):
        for number, name in enumerate(("ant", "bee", "cat")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(5):
                (folder / f"{i}.jpg").write_bytes(encoded("JPEG", 100 * number + i + 10 * len(split)))
    return root


def opened(root: Path, split: str = "train", **fields: object) -> FolderImages:
    images = open_images(recipe_for(root, **fields), split)
    assert isinstance(images, FolderImages)
    return images


def png_with_wrong_checksum() -> bytes:
    """The checksum of the chunk IDAT is wrong, its content is right: decoders that do not look show a picture."""
    data = bytearray(encoded("PNG"))
    place = data.index(b"IDAT")
    length = int.from_bytes(data[place - 4 : place], "big")
    data[place + 4 + length] ^= 1
    return bytes(data)


def damage(kind: str) -> bytes:
    jpeg, png, gif = encoded("JPEG"), encoded("PNG"), encoded("GIF")
    progressive = encoded("JPEG", progressive=True)
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    return {
        "empty": b"",
        "html": b"<!DOCTYPE html><html>404 Not Found</html>",
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "jpeg without its last tenth": jpeg[: len(jpeg) * 9 // 10],
        "progressive jpeg without its last scans": progressive[: len(progressive) * 2 // 3],
        "jpeg header": jpeg[:40],
        "truncated png": png[:-40],
        "png with a wrong checksum": png_with_wrong_checksum(),
        "png with a flipped byte": bytes(flipped),
        "truncated gif": gif[: len(gif) // 2],
        "truncated webp": encoded("WEBP")[:300],
        "truncated tiff": encoded("TIFF")[:900],
        "zeros": bytes(5000),
        "bomb": bomb(),
    }[kind]


def bomb() -> bytes:
    """A PNG that claims 60 000 × 60 000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    size = (60_000).to_bytes(4, "big") * 2
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\2\0\0\0") + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


KINDS = [
    "empty", "html", "truncated jpeg", "jpeg without its last tenth", "progressive jpeg without its last scans",
    "jpeg header", "truncated png", "png with a wrong checksum", "png with a flipped byte", "truncated gif",
    "truncated webp", "truncated tiff", "zeros", "bomb",
]  # fmt: skip


@pytest.mark.parametrize("tolerant", [False, True])
def test_every_damage_is_found_and_all_are_listed_at_once(
    tmp_path: Path, tolerant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    root = pictures(tmp_path / "data")
    for number, kind in enumerate(KINDS):
        (root / "train" / "bee" / f"x{number:02}.jpg").write_bytes(damage(kind))
    (root / "test" / "cat" / "x.png").write_bytes(damage("truncated png"))
    with pytest.raises(DataError) as caught:
        check_images(opened(root), opened(root, "test"))
    message = str(caught.value)
    missing = [kind for number, kind in enumerate(KINDS) if f"train/bee/x{number:02}.jpg" not in message]
    assert missing == []
    assert message.startswith(f"15 damaged images ({root}); found ")
    assert "an empty file: train/bee/x00.jpg" in message
    assert "not an image: train/bee/x01.jpg" in message
    assert "test/cat/x.png" in message
    assert message.endswith("leave them out with --set dataset.on_bad_image=skip.")
    assert tolerant == ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_sound_images_pass(kind: str) -> None:
    options = {"progressive": True} if kind == "JPEG" else {}
    assert examine_image(encoded(kind, **options), PixelRules()) == Finding()
    cmyk = io.BytesIO()
    photo(40, 30).convert("CMYK").save(cmyk, "JPEG")
    assert examine_image(cmyk.getvalue(), PixelRules()) == Finding()


def test_a_long_list_is_cut_and_stored_in_full(tmp_path: Path, home: Path) -> None:
    root = pictures(tmp_path / "data")
    for number in range(33):
        (root / "train" / "ant" / f"bad{number:02}.jpg").write_bytes(b"\xff\xd8\xff" + bytes([number]))
    with pytest.raises(DataError, match=r"33 damaged images.*and 13 more \(all of them are in (\S+)\)") as caught:
        check_images(opened(root))
    assert str(caught.value).count("/bad") + str(caught.value).count(" bad") == 20 + 0
    [listed] = (home / "checked-images").glob("damaged-*.txt")
    assert str(listed) in str(caught.value)
    lines = listed.read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"{root}/train/ant/bad{n:02}.jpg" for n in range(33)]


def test_skip_leaves_out_what_is_damaged(tmp_path: Path) -> None:
    root = pictures(tmp_path / "data")
    for name in ("ant/1.jpg", "cat/4.jpg"):
        file = root / "train" / name
        file.write_bytes(file.read_bytes()[:300])
    skipped = opened(root, on_bad_image="skip")
    assert len(skipped) == 13
    assert np.bincount(skipped.labels).tolist() == [4, 5, 4]
    assert skipped.summary.damaged == dict.fromkeys(("ant/1.jpg", "cat/4.jpg"), "image file is truncated")
    assert skipped.notes() == [f"{root}/train: 2 damaged images skipped: image file is truncated: ant/1.jpg, cat/4.jpg"]
    check_images(skipped)
    assert skipped.load(slice(None)).shape == (13, 3, 32, 32)
    for name in ("ant/1.jpg", "cat/4.jpg"):  # the same samples as in a folder without the files
        (root / "train" / name).unlink()
    assert opened(root).identity() == skipped.identity()


def test_a_class_must_keep_an_image(tmp_path: Path) -> None:
    root = pictures(tmp_path / "data")
    for number in range(5):
        (root / "train" / "bee" / f"{number}.jpg").write_bytes(b"\xff\xd8\xff\0" + bytes([number]))
    with pytest.raises(DataError, match=r"every image of a class is damaged.*bee"):
        opened(root, on_bad_image="skip")


def test_outcomes_are_remembered_by_content(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = pictures(tmp_path / "data")
    bad = root / "train" / "bee" / "2.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    first = findings(opened(root))
    assert list(first.values()) == [Finding(problem="image file is truncated")]
    decoded: list[bytes] = []

    def counted(data: bytes, rules: PixelRules) -> Finding:
        decoded.append(data)
        return examine_image(data, rules)

    monkeypatch.setattr(check, "examine_image", counted)
    for new_process in (False, True):
        if new_process:
            check._memory.cache_clear()
        assert findings(opened(root)) == first
    assert decoded == []
    (root / "train" / "ant" / "0.jpg").rename(root / "train" / "cat" / "z.jpg")  # another place, the same content
    bad.write_bytes(encoded("JPEG", 999))
    assert findings(opened(root)) == {}
    assert decoded == [bad.read_bytes()]
    assert findings(opened(root, value_range=[0, 4095])) == {}
    assert len(decoded) == 1 + 15  # other rules, other outcomes


def test_a_home_that_cannot_be_written_or_is_damaged(tmp_path: Path, home: Path) -> None:
    root = pictures(tmp_path / "data")
    home.write_text("a file is in the way")
    check_images(opened(root))
    home.unlink()
    check._memory.cache_clear()
    check_images(opened(root))
    [keys] = (home / "checked-images").glob("*.keys")
    assert keys.stat().st_size == 15 * 16
    keys.write_bytes(b"damaged")
    check._memory.cache_clear()
    check_images(opened(root))
    assert keys.stat().st_size == 15 * 16
    assert cache_home() == home


def test_a_file_that_changes_is_not_remembered(tmp_path: Path) -> None:
    root = pictures(tmp_path / "data")
    images = opened(root)
    file = root / "train" / "cat" / "3.jpg"
    old = file.read_bytes()
    file.write_bytes(encoded("JPEG", 4242))
    with pytest.raises(DataError, match=r"changed since the folder was opened: \S*cat/3\.jpg"):
        check_images(images)
    file.write_bytes(old)
    check_images(images)


def write_deep(root: Path, values: np.ndarray, suffix: str) -> Path:
    for name in ("a", "b"):
        (root / "train" / name).mkdir(parents=True)
        Image.fromarray(values).save(root / "train" / name / f"0{suffix}")
    return root


RAMP = np.arange(1024).reshape(32, 32)


@pytest.mark.parametrize(("most", "suffix"), [(4095, ".png"), (1023, ".tiff"), (16383, ".png")])
def test_fewer_bits_in_sixteen_ask_for_the_range(tmp_path: Path, most: int, suffix: str) -> None:
    values = (RAMP * most // 1023).astype(np.uint16)
    root = write_deep(tmp_path / "data", values, suffix)
    with pytest.raises(
        DataError, match=rf"2 images with 16-bit grey.*nearly black.*values from 0 to {most}.*value_range"
    ):
        check_new_images(opened(root, test_split=None))
    images = opened(root, test_split=None, value_range=[0, most])
    check_new_images(images)
    np.testing.assert_array_equal(images.load(slice(0, 1))[0, 0], values.astype(int) * 256 // (most + 1))
    as_they_are = opened(root, test_split=None, value_range=[0, 65535])
    check_new_images(as_they_are)
    np.testing.assert_array_equal(as_they_are.load(slice(0, 1))[0, 0], values >> 8)


def test_one_bright_image_shows_that_the_range_is_full(tmp_path: Path) -> None:
    root = write_deep(tmp_path / "data", RAMP.astype(np.uint16), ".png")
    Image.fromarray((RAMP * 64).astype(np.uint16)).save(root / "train" / "a" / "bright.png")
    check_new_images(opened(root, test_split=None))


def test_integers_without_a_range_are_no_damaged_images(tmp_path: Path) -> None:
    root = write_deep(tmp_path / "data", RAMP.astype(np.int32) - 24, ".tiff")
    for policy in ("error", "skip"):
        images = opened(root, test_split=None, on_bad_image=policy)
        with pytest.raises(DataError, match=r"2 images with integers whose range is not declared.*from -24 to 999"):
            check_images(images)
    check_new_images(opened(root, test_split=None, value_range=[-24, 999]))


def test_dark_deep_colour_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        (tmp_path / "data" / "train" / name / "0.png").write_bytes(deep_colour_png(4000))
    with pytest.raises(DataError, match=r"2 images with 16-bit colour.*convert the images to 8 bits per channel"):
        check_new_images(opened(tmp_path / "data", test_split=None))


def test_pages_and_frames_are_noted(tmp_path: Path) -> None:
    data = io.BytesIO()
    photo(30, 30).save(data, "TIFF", save_all=True, append_images=[photo(30, 30, 1)])
    root = pictures(tmp_path / "data")
    (root / "train" / "bee" / "pages.tif").write_bytes(data.getvalue())
    images = opened(root)
    assert list(findings(images).values()) == [Finding(frames=True)]
    check_images(images)
    assert frame_notes(images, None) == [
        f"{root}/train: 1 image with several frames or pages: the first is used (bee/pages.tif)"
    ]
    assert read_image(root / "train" / "bee" / "pages.tif") == data.getvalue()
