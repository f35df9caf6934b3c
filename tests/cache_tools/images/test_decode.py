"""Decoding image files: orientation, transparency, depth and colour, with exact pixel values."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from cache_tools.errors import DataError
from cache_tools.images import open_images
from cache_tools.images.decode import Finding, PixelRules, decode_image, examine_image, whole_images_only
from cache_tools.images.recipe import DatasetRecipe
from tests.support.pictures import photo, recipe_for

SIZE = 32


def decode(image: Image.Image, tmp_path: Path, suffix: str, **options: Any) -> np.ndarray:
    """Save an image, open it as a folder of one image, and return its pixels."""
    folder = tmp_path / "one" / "train" / "class"
    folder.mkdir(parents=True)
    image.save(folder / f"image{suffix}", **options)
    return open_images(recipe_for(tmp_path / "one")).load(slice(None))[0]


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes, size: int = SIZE, **rules: Any) -> np.ndarray:
    """uint8 [size, size, 3]; a picture of that size is neither resized nor cropped."""
    return decode_image(data, size, "memory", PixelRules(**rules))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    """A camera stores the transposed picture and says how to turn it back."""
    upright = Image.new("RGB", (48, 32), "red")
    upright.paste("blue", (0, 0, 24, 16))
    upright.paste("lime", (24, 16, 48, 32))
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = upright if stored is None else upright.transpose(stored)
    found = decode(turned, tmp_path, suffix, exif=exif)
    corners = found[:, [4, 4, 27, 27], [4, 27, 4, 27]].T
    expected = [[0, 0, 255], [255, 0, 0], [255, 0, 0], [0, 255, 0]]
    assert np.abs(corners.astype(int) - expected).max() < 12  # JPEG


def test_grey_palette_alpha_and_bilevel_become_rgb(tmp_path: Path) -> None:
    grey = photo(SIZE, SIZE).convert("L")
    for number, (image, suffix) in enumerate(
        [
            (grey, ".png"),
            (grey.convert("P"), ".gif"),
            (grey.convert("LA"), ".png"),
            (grey.convert("RGBA"), ".webp"),
        ]
    ):
        found = decode(image, tmp_path / str(number), suffix, **({"lossless": True} if suffix == ".webp" else {}))
        for channel in found:
            np.testing.assert_array_equal(channel, np.asarray(grey))
    found = decode(grey.convert("1"), tmp_path / "bilevel", ".png")
    np.testing.assert_array_equal(np.unique(found), [0, 255])


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path: Path) -> None:
    values = (np.arange(SIZE * SIZE).reshape(SIZE, SIZE) * 64).astype(np.uint16)  # PIL's convert would clip to 255
    for number, suffix in enumerate((".png", ".tiff")):
        found = decode(Image.fromarray(values), tmp_path / str(number), suffix)
        for channel in found:
            np.testing.assert_array_equal(channel, values >> 8)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    image = Image.new("CMYK", (50, 40), (0, 255, 255, 0))
    found = decode(image, tmp_path, ".jpg", quality=95)
    assert np.abs(found[:, 16, 16].astype(int) - [255, 0, 0]).max() < 8


def test_very_long_and_tiny_images(tmp_path: Path) -> None:
    """The long side must not be blown up before it is cropped: 4 × 60 000 would become 480 000 pixels high."""
    assert decode(photo(4, 60_000), tmp_path / "long", ".png").shape == (3, SIZE, SIZE)
    one = decode(Image.new("RGB", (1, 1), (9, 8, 7)), tmp_path / "tiny", ".png")
    np.testing.assert_array_equal(one.reshape(3, -1), np.tile([[9], [8], [7]], SIZE * SIZE))


# --- transparency ---


def half_red(mode: str) -> Image.Image:
    """Left half opaque, right half with alpha 128; red, or grey 255 for LA."""
    alpha = np.full((SIZE, SIZE), 255, np.uint8)
    alpha[:, SIZE // 2 :] = 128
    image = Image.new("RGB", (SIZE, SIZE), (255, 0, 0)) if mode == "RGBA" else Image.new("L", (SIZE, SIZE), 60)
    image.putalpha(Image.fromarray(alpha))
    return image


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("background", "seen"), [((255, 255, 255), (255, 127, 127)), ((0, 0, 0), (128, 0, 0)),
                                                  ((10, 20, 200), (133, 10, 100))])  # fmt: skip
def test_alpha_is_composited_on_the_background(kind: str, background: Any, seen: Any) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    found = pixels(saved(half_red("RGBA"), kind, **options), background=background)
    assert found[5, 5].tolist() == [255, 0, 0]
    assert found[5, 25].tolist() == list(seen)


def test_every_alpha_rounds_to_the_nearest_level() -> None:
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    rgba = np.stack([colour, 255 - colour, colour // 2, alpha], axis=2).astype(np.uint8)
    found = pixels(saved(Image.fromarray(rgba), "PNG"), 256, background=(200, 7, 90))
    a = alpha[..., None] / 255.0
    expected = np.floor(rgba[..., :3] * a + np.array([200, 7, 90]) * (1 - a) + 0.5)
    np.testing.assert_array_equal(found, expected)


def test_grey_with_alpha_palette_and_colour_key() -> None:
    assert pixels(saved(half_red("LA"), "PNG"))[5, 25].tolist() == [157, 157, 157]  # (60·128 + 255·127) / 255
    image = photo(SIZE, SIZE).quantize(16)
    data = saved(image, "PNG", transparency=3)
    expected = np.asarray(image.convert("RGB")).copy()
    expected[np.asarray(image) == 3] = (9, 8, 7)
    np.testing.assert_array_equal(pixels(data, background=(9, 8, 7)), expected)
    key = Image.new("RGB", (SIZE, SIZE), (1, 2, 3))
    key.paste((4, 5, 6), (0, 0, 16, 32))
    found = pixels(saved(key, "PNG", transparency=(1, 2, 3)))
    assert found[0, [0, 31]].tolist() == [[4, 5, 6], [255, 255, 255]]
    grey = Image.fromarray(np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 64)
    found = pixels(saved(grey, "PNG", transparency=640))[..., 0]
    assert (found[0, 9], found[0, 10], found[0, 11]) == (9 * 64 >> 8, 255, 11 * 64 >> 8)


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    image = photo(SIZE, SIZE)
    with_alpha = image.copy()
    with_alpha.putalpha(255)
    np.testing.assert_array_equal(pixels(saved(with_alpha, "PNG")), np.asarray(image))


def test_a_gif_shows_its_first_frame_on_the_background() -> None:
    frames = [Image.new("P", (SIZE, SIZE), colour) for colour in (1, 2)]
    for frame in frames:
        frame.putpalette([0, 0, 0, 10, 200, 30, 250, 0, 0])
        frame.paste(0, (0, 0, 8, 8))
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=0)
    found = pixels(data)
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[20, 20].tolist() == [10, 200, 30]
    assert examine_image(data, PixelRules()) == Finding(frames=True)


def test_exif_that_cannot_be_read_leaves_the_image_as_it_is() -> None:
    image = photo(SIZE, SIZE)
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        data = saved(image, "JPEG", quality=95, exif=exif)
        with whole_images_only():  # also keeps PIL's warnings quiet
            assert examine_image(data, PixelRules()) == Finding()
            np.testing.assert_array_equal(pixels(data), pixels(saved(image, "JPEG", quality=95)))


# --- more than eight bits ---


def tiff(values: np.ndarray, **tags: int) -> bytes:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[{"smallest": 280, "largest": 281}[name]] = value
    return saved(Image.fromarray(values), "TIFF", tiffinfo=info)


RAMP = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)


def packed_twelve_bits(values: np.ndarray) -> bytes:
    """A grey TIFF of 12 bits per sample, two pixels in three bytes."""
    flat = values.ravel().astype(int)
    first, second = flat[0::2], flat[1::2]
    strip = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()
    entries = [(256, 3, values.shape[1]), (257, 3, values.shape[0]), (258, 3, 12), (259, 3, 1), (262, 3, 1),
               (273, 4, 8), (277, 3, 1), (278, 3, values.shape[0]), (279, 4, len(strip))]  # fmt: skip
    table = b"".join(struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in entries)
    directory = struct.pack("<H", len(entries)) + table + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory


def test_declared_ranges_of_tiff() -> None:
    values = (RAMP * 4).astype(np.uint16)  # 0 … 4092
    np.testing.assert_array_equal(pixels(packed_twelve_bits(values))[..., 0], values >> 4)
    np.testing.assert_array_equal(pixels(tiff(values, largest=4095))[..., 1], values >> 4)
    np.testing.assert_array_equal(pixels(tiff(values.astype(np.int32), largest=4095))[..., 2], values >> 4)
    # the highest value of this image, not a number of bits
    np.testing.assert_array_equal(pixels(tiff(values, largest=4092))[..., 0], values >> 8)


@pytest.mark.parametrize(
    ("values", "value_range", "expected"),
    [
        ((RAMP * 4).astype(np.uint16), (0, 4095), RAMP * 4 >> 4),
        ((RAMP * 64).astype(np.uint16), (0, 65535), RAMP * 64 >> 8),
        (RAMP.astype(np.int32) - 500, (-500, 523), RAMP >> 2),
        (RAMP.astype(np.int32) * 70_000, (0, 1023 * 70_000), RAMP * 70_000 * 256 // (1023 * 70_000 + 1)),
        ((RAMP / 1023).astype(np.float32), (0.0, 1.0), np.minimum(RAMP * 256 // 1023, 255)),
        (RAMP.astype(np.uint16), (100, 355), np.clip(RAMP - 100, 0, 255)),
    ],
)
def test_a_given_range_is_cut_into_256_equal_steps(values: np.ndarray, value_range: Any, expected: np.ndarray) -> None:
    found = pixels(saved(Image.fromarray(values), "TIFF"), value_range=value_range)
    for channel in range(3):
        np.testing.assert_array_equal(found[..., channel], expected)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (RAMP.astype(np.int32), "integers from 0 to 1023"),
        (RAMP.astype(np.int16) - 1000, "integers from -1000 to 23"),
        (RAMP.astype(np.float32) / 1023, "floating-point values from 0 to 1"),
    ],
)
def test_values_without_a_declared_range_are_refused(values: np.ndarray, kind: str) -> None:
    data = saved(Image.fromarray(values.astype(np.int32) if values.dtype == np.int16 else values), "TIFF")
    with pytest.raises(DataError, match=rf"{kind}, whose range is not declared.*dataset\.value_range"):
        pixels(data)
    found = examine_image(data, PixelRules())
    assert found.unknown_range == (values.min(), values.max())
    assert found.problem is None


def test_eight_bits_ignore_the_range_and_deep_colour_refuses_it() -> None:
    image = photo(SIZE, SIZE)
    np.testing.assert_array_equal(pixels(saved(image, "PNG"), value_range=(0, 4095)), np.asarray(image))
    data = deep_colour_png(3000)
    assert (pixels(data) == 3000 >> 8).all()
    assert examine_image(data, PixelRules()).deep == (2816.0, 3071.0)  # only the high byte, 11, is read
    with pytest.raises(DataError, match="only the high byte can be read"):
        pixels(data, value_range=(0, 4095))


def test_portable_grey_maps_are_scaled_by_their_own_maximum() -> None:
    body = (RAMP * 4).astype(">u2").tobytes()
    found = pixels(b"P5 32 32 4095\n" + body)[..., 0].astype(int)
    assert np.abs(found - (RAMP * 4 >> 4)).max() <= 1
    assert examine_image(b"P5 32 32 4095\n" + body, PixelRules()) == Finding()


def deep_colour_png(value: int) -> bytes:
    """A PNG of SIZE × SIZE with 16 bits per channel, all of one value."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = (b"\0" + struct.pack(">H", value) * 3 * SIZE) * SIZE
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- the recipe ---


def test_the_background_and_the_range_are_part_of_the_identity(tmp_path: Path) -> None:
    photo(40, 40).save(tmp_path / "a.png")
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        half_red("RGBA").save(tmp_path / "train" / name / "0.png")
    plain = open_images(recipe_for(tmp_path, test_split=None)).identity()
    assert set(plain.model_dump(mode="json")) == {
        "name", "split", "num_samples", "image_size", "class_names", "content_digest",
    }  # fmt: skip
    for fields in ({"background": "white"}, {"background": [255, 255, 255]}):
        assert open_images(recipe_for(tmp_path, test_split=None, **fields)).identity() == plain
    black = open_images(recipe_for(tmp_path, test_split=None, background="black"))
    assert black.identity().background == (0, 0, 0)
    assert black.load(slice(0, 1))[0, :, 5, 25].tolist() == [128, 0, 0]
    ranged = open_images(recipe_for(tmp_path, test_split=None, value_range=[0, 4095])).identity()
    assert ranged.model_dump(mode="json")["value_range"] == [0, 4095]


@pytest.mark.parametrize(
    "fields",
    [{"background": "grey"}, {"background": [0, 0, 256]}, {"value_range": [5, 5]}, {"value_range": [0, float("inf")]},
     {"name": "digits", "data_dir": None, "background": "black"}, {"name": "digits", "on_bad_image": "skip"}],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"background|value_range|on_bad_image"):
        DatasetRecipe.model_validate({"name": "folder", "data_dir": tmp_path, **fields})
