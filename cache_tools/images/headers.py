"""The size of a picture as the header of its file says. JPEG and PNG are read here, which takes microseconds."""

from __future__ import annotations

import io

from cache_tools.images.formats import register_decoders

MAX_SIDE = (1 << 31) - 1  # of columns of sizes
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # markers that begin with the size of the picture
_SEGMENTS = frozenset({*_FRAMES, 0xC4, 0xCC, *range(0xDB, 0xF0), 0xFE}) - {0xDC, 0xDE}  # markers with a length


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) as the header of an image says, before it is turned upright; (0, 0) if it cannot be read."""
    found = _png_size(data) if data[:1] == b"\x89" else _jpeg_size(data) if data[:2] == b"\xff\xd8" else None
    size = found or _size_by_pil(data)
    return size if max(size) <= MAX_SIDE else (0, 0)


def _png_size(data: bytes) -> tuple[int, int] | None:
    if not data.startswith(_PNG) or len(data) < 24:
        return None
    size = int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    return size if min(size) else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """The size of an ordinary JPEG, by its last frame before the first scan; None leaves the file to PIL."""
    size, place = None, 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xDA:
            return size if size and min(size) else None
        if marker not in _SEGMENTS:
            return None
        if marker in _FRAMES:
            frame = data[place + 4 : place + 10]
            if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3, 4):
                return None
            size = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _size_by_pil(data: bytes) -> tuple[int, int]:
    from PIL import Image

    register_decoders()
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return opened.height, opened.width
    except Exception:  # decoders raise almost any exception on damaged bytes
        return 0, 0
