"""One of every kind of picture that people have: it is decoded right, or listed by name with the reason.

The table is KINDS. Each picture goes through the folder, the check, both ways to load it, and the command.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cache_tools.errors import DataError
from cache_tools.images import check, open_images
from cache_tools.images.check import (
    PictureSizes,
    check_new_images,
    check_splits,
    frame_notes,
    picture_sizes,
)
from cache_tools.images.folder import FolderImages
from cache_tools.images.headers import _size_by_pil, image_size
from pipeline.cli import app
from tests.support.pictures import photo, recipe_for

SIDE = 32
EXACT, LOSSY = 0.0, 4.0  # mean difference from the right pixels


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    """Without noise, so that lossy formats come close."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=2).astype(np.uint8))


def transparent() -> tuple[bytes, np.ndarray]:
    """The upper half shows, the lower half is the white behind it."""
    pixels = np.asarray(photo(40, 36)).copy()
    alpha = np.zeros((36, 40), np.uint8)
    alpha[:18] = 255
    data = saved(Image.fromarray(np.dstack([pixels, alpha])), "PNG")
    pixels[18:] = 255
    return data, pixels


def animated() -> tuple[bytes, np.ndarray]:
    frames = [Image.new("RGB", (40, 36), colour) for colour in ("#204060", "#ff0000", "#00ff00")]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), np.asarray(frames[0])


def rotated() -> tuple[bytes, np.ndarray]:
    """As phones store a picture that was taken upright."""
    upright, exif = smooth(36, 48), Image.Exif()
    exif[0x0112] = 6
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    return saved(stored, "JPEG", quality=95, exif=exif), np.asarray(upright)


def twelve_bits() -> bytes:
    return saved(Image.fromarray((np.arange(1600).reshape(40, 40) * 2).astype(np.uint16)), "PNG")


PLAIN, SMOOTH = photo(40, 36), smooth(40, 36)
LONG = smooth(30_000, 3)
WHOLE = saved(SMOOTH, "JPEG", quality=95)
# file → (its bytes, the right pixels, and how far from them the mean may be)
GOOD: dict[str, tuple[bytes, np.ndarray, float]] = {
    "cmyk.jpg": (saved(SMOOTH.convert("CMYK"), "JPEG", quality=95), np.asarray(SMOOTH), LOSSY),
    "transparent.png": (*transparent(), EXACT),
    "animated.gif": (*animated(), EXACT),
    "rotated.jpg": (*rotated(), LOSSY),
    "one-pixel.png": (saved(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), np.full((1, 1, 3), (9, 8, 7)), EXACT),
    "long.png": (saved(LONG, "PNG"), np.asarray(LONG), EXACT),
    "long.jpg": (saved(LONG, "JPEG", quality=95, subsampling=0), np.asarray(LONG), LOSSY),
    "photo.jfif": (WHOLE, np.asarray(SMOOTH), LOSSY),
    "photo.avif": (saved(SMOOTH, "AVIF", quality=90), np.asarray(SMOOTH), LOSSY),
    "photo.jp2": (saved(SMOOTH, "JPEG2000"), np.asarray(SMOOTH), EXACT),
    "no-extension": (saved(PLAIN, "PNG"), np.asarray(PLAIN), EXACT),
    "wrong-extension.png": (WHOLE, np.asarray(SMOOTH), LOSSY),
}
# file → (its bytes, the reason by which it is listed)
DAMAGED = {
    "truncated.jpg": (WHOLE[: len(WHOLE) * 2 // 3], "image file is truncated"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an image"),
    "empty.png": (b"", "an empty file"),
    "zeros.jpg": (bytes(4000), "not an image"),
}
LEFT_OUT = {"index.html": (b"<!DOCTYPE html><html></html>", "HTML page"), "film.mp4": (b"\0\0\0\x18ftypmp42", "video")}


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
    check._memory.cache_clear()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds in one class, and an ordinary picture in another."""
    root = tmp_path_factory.mktemp("odd")
    for name in ("odd", "plain"):
        (root / "train" / name).mkdir(parents=True)
    (root / "train" / "plain" / "0.png").write_bytes(saved(PLAIN, "PNG"))
    for name, (data, *_) in (GOOD | DAMAGED | LEFT_OUT).items():
        (root / "train" / "odd" / name).write_bytes(data)
    return root


def opened(root: Path, **fields: Any) -> FolderImages:
    images = open_images(recipe_for(root, test_split=None, **fields))
    assert isinstance(images, FolderImages)
    return images


def test_every_file_is_a_sample_or_is_listed_with_the_reason(root: Path) -> None:
    images = opened(root)
    found = check_splits(images)
    assert found.images == len(images) == len(GOOD) + len(DAMAGED) + 1
    odd = root / "train" / "odd"
    assert found.damaged == {str(odd / name): reason for name, (_, reason) in DAMAGED.items()}
    assert found.left_out == {str(odd / name): reason for name, (_, reason) in LEFT_OUT.items()}
    (note,) = frame_notes(images)
    assert "1 image with several frames or pages: the first is used (odd/animated.gif)" in note


def test_headers_say_the_sizes_that_pil_reads(root: Path) -> None:
    contents = [data for data, *_ in (GOOD | DAMAGED | LEFT_OUT).values()]
    contents += [saved(SMOOTH, "JPEG", progressive=True), saved(SMOOTH.convert("L"), "JPEG"), saved(SMOOTH, "WEBP")]
    contents += [WHOLE[:stop] for stop in range(0, len(WHOLE), 7)]
    contents += [WHOLE[:2] + b"\xff\xff" + WHOLE[3:], WHOLE[:2] + b"\xff\xff\xff" + WHOLE[3:]]  # fill bytes
    contents += [saved(PLAIN, "PNG")[:stop] for stop in range(60)]
    for data in contents:
        found, expected = image_size(data), _size_by_pil(data)
        assert found == expected or expected == (0, 0), data[:40]  # a cut file may have a whole header
    images = opened(root)
    rows = {images.name_of(row).partition("/")[2]: row for row in range(len(images))}
    for name, (_, pixels, _) in GOOD.items():
        assert sorted(images.header_sizes()[rows[name]].tolist()) == sorted(pixels.shape[:2]), name
    sizes = picture_sizes([images.subset(np.array([rows["long.png"], rows["one-pixel.png"]]))], (2, 2))
    assert sizes == PictureSizes(2, (1, 2, 3), 1, 3 * (90_000 + 1))


@pytest.mark.parametrize("name", GOOD)
def test_the_others_are_decoded_right(root: Path, name: str) -> None:
    """At their own size, and on the canvas: there as the whole picture resized and cropped, which costs more."""
    images = opened(root, on_bad_image="skip")
    row = [images.name_of(number) for number in range(len(images))].index(f"odd/{name}")
    _, right, tolerance = GOOD[name]
    (picture,) = images.pictures(np.array([row]))
    assert picture.shape == (3, *right.shape[:2])
    assert np.abs(picture.transpose(1, 2, 0).astype(float) - right).mean() <= tolerance
    height, width = right.shape[:2]
    scale = SIDE / min(height, width)
    size = (max(SIDE, int(width * scale)), max(SIDE, int(height * scale)))
    whole = Image.fromarray(picture.transpose(1, 2, 0)).resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
    canvas = np.asarray(whole.crop((left, top, left + SIDE, top + SIDE)))
    found = images.load(np.array([row]))[0].transpose(1, 2, 0)
    assert np.abs(found.astype(int) - canvas).max() <= 2  # PIL rounds between the two axes


def test_damaged_files_stop_a_build_and_skip_leaves_out_just_these(root: Path) -> None:
    with pytest.raises(DataError, match=rf"^{len(DAMAGED)} damaged images") as caught:
        check_new_images(opened(root))
    assert [name for name in DAMAGED if name not in str(caught.value)] == []
    images = opened(root, on_bad_image="skip")
    check_new_images(images)
    assert len(images) == len(GOOD) + 1
    (note,) = [line for line in images.notes() if "skipped" in line]
    assert f"{len(DAMAGED)} damaged images skipped" in note


def test_twelve_bits_in_sixteen_ask_for_their_range(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "scan.png").write_bytes(twelve_bits())
    with pytest.raises(DataError, match=r"16-bit grey which would be nearly black.*value_range='\[0, 4095\]'"):
        check_new_images(opened(tmp_path))
    images = opened(tmp_path, value_range=[0, 4095])
    check_new_images(images)
    expected = np.arange(1600).reshape(40, 40) * 2 >> 4
    for channel in images.pictures(slice(0, 1))[0]:
        np.testing.assert_array_equal(channel, expected)


def test_the_command_prints_one_table_and_fails(root: Path) -> None:
    options = [str(root), "--check-images", "--teacher", "resnet8", "--set", "dataset.test_split=null"]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 2
    lines = done.stdout.splitlines()
    assert max(map(len, lines[1:])) <= 80  # the first is the folder
    for kinds, what in ((DAMAGED, "damaged"), (LEFT_OUT, "left out")):
        for name, (_, reason) in kinds.items():
            (line,) = [line for line in lines if line.startswith(name)]
            assert line.split(maxsplit=1)[1].split("  ")[0] == reason
            assert line.endswith(what)
    assert f"{len(DAMAGED)} damaged images of {len(GOOD) + len(DAMAGED) + 1}" in done.stderr
    as_json = CliRunner().invoke(app, [*options, "--json", "--set", "dataset.on_bad_image=skip"])
    assert as_json.exit_code == 0, as_json.stderr
    found = json.loads(as_json.stdout)
    assert {Path(name).name for name in found["damaged"]} == DAMAGED.keys()
    assert {Path(name).name for name in found["left_out"]} == LEFT_OUT.keys()
    assert found["sizes"]["shorter_sides"] == [1, 36, 36]
