"""What a file holds, from its first bytes: an image that can be decoded, an image that cannot, or something else."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import NamedTuple

HEAD_BYTES = 1024  # enough for every signature

# Files with these endings are meant to be images: if their bytes are not, they are damaged.
EXTENSIONS = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".webp",
        ".gif",
        ".avif",
        ".heic",
        ".heif",
        ".jp2",
        ".j2k",
        ".jxl",
        ".tga",
        ".qoi",
    ]
)
# Version 0.1 took files with these endings only.
FIRST_EXTENSIONS = frozenset([".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif"])
CAMERA_RAW = frozenset(
    [".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"]
)  # most are TIFF files inside

_SIGNATURES = {  # of images: first bytes → name
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"qoif": "QOI",
    b"8BPS": "PSD",
    b"DDS ": "DDS",
    b"icns": "ICNS",
    b"\0\0\1\0": "ICO",
    b"\1\xda": "SGI",
}
_OTHERS = {  # of other files
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"PK\3\4": "archive",
    b"\x1f\x8b": "archive",
    b"Rar!": "archive",
    b"7z\xbc\xaf": "archive",
    b"\xd0\xcf\x11\xe0": "thumbnail database",  # Thumbs.db, and old office documents
    b"\x1aE\xdf\xa3": "video",
    b"\0\0\1\xba": "video",
    b"\x93NUMPY": "NumPy array",
    b"\x89HDF": "HDF5",
    b"FUJIFILMCCD-RAW": "camera raw",
    b"IIU\0": "camera raw",
    b"IIRO": "camera raw",
    b"IIRS": "camera raw",
}
_BMP_HEADERS = {12, 16, 40, 52, 56, 64, 108, 124}
_ALWAYS_DECODED = frozenset({"JPEG", "PNG", "GIF", "BMP", "TIFF", "PNM"})
_FEATURES = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}


class Content(NamedTuple):
    """What a file holds: its format in a word, and whether that is a format of images."""

    name: str
    is_image: bool


def identify(head: bytes) -> Content:
    """The content of a file that begins with `head`, its first `HEAD_BYTES` bytes."""
    if not head:
        return Content("empty", False)
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            return Content(name, True)
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return Content("BMP", True)
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace() and head[3:].lstrip()[:1] in b"0123456789#":
        return Content("PNM", True)
    if head[:4] == b"RIFF":
        return Content("WEBP", True) if head[8:12] == b"WEBP" else Content("video or sound", False)
    if head[4:8] == b"ftyp":
        return _identify_media(head[8:12], head[16:64])
    for signature, name in _OTHERS.items():
        if head.startswith(signature):
            return Content(name, False)
    return Content(_text_or_unknown(head), False)


# Packages that bring a missing decoder.
DECODERS = {"HEIC": "pillow-heif", "AVIF": "Pillow 11.3 or later"}


def no_decoder(name: str) -> str:
    """The reason to leave out an image of a format that `is_decodable` denies."""
    return f"{name} (no decoder)"


@cache
def is_decodable(name: str) -> bool:
    """Whether PIL, with the plugins that are installed, decodes images of a format that `identify` names."""
    if name in _ALWAYS_DECODED:
        return True
    from PIL import Image, features

    register_decoders()
    Image.init()
    feature = _FEATURES.get(name)
    return {"HEIC": "HEIF"}.get(name, name) in Image.OPEN and (feature is None or bool(features.check(feature)))


@cache
def register_decoders() -> None:
    """Let PIL use the package pillow-heif where it is installed; needed once in each process."""
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return
    register_heif_opener()


def decoder_versions() -> dict[str, str]:
    """The libraries that decode images, with their versions: pixels may differ between versions."""
    import PIL
    from PIL import features

    register_decoders()
    found = {"pillow": PIL.__version__}
    for name, feature in (("libjpeg-turbo", "libjpeg_turbo"), *((name, name) for name in ("webp", "avif", "jpg_2000"))):
        if (number := features.version(feature)) is not None:
            found[name] = str(number)
    if "HEIF" in PIL.Image.OPEN:
        found["pillow-heif"] = version("pillow-heif")
    return found


def _identify_media(brand: bytes, compatible: bytes) -> Content:
    """A file in the container of MPEG-4: a video, or an image of newer phones."""
    if brand in {b"avif", b"avis"} or (brand in {b"mif1", b"msf1"} and b"avif" in compatible):
        return Content("AVIF", True)
    if brand in {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
        return Content("HEIC", True)
    return Content("camera raw", False) if brand == b"crx " else Content("video", False)


def _text_or_unknown(head: bytes) -> str:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:256].lower()
    if b"<svg" in head[:HEAD_BYTES].lower():
        return "SVG"
    if start.startswith((b"<!doctype html", b"<html")):
        return "HTML page"
    control = sum(byte < 9 or 13 < byte < 27 for byte in head)
    return "unknown format" if control else "text"
