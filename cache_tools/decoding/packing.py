"""Find the pixel file of an image set in the cache home, or make it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.console import Progress, print_line, storage_error, warn
from cache_tools.decoding.packed import PackedImages
from cache_tools.decoding.pixel_file import (
    SUFFIX,
    TooLargeError,
    file_bytes,
    open_pixel_file,
    pixel_file_in_memory,
    pixel_files,
    unique_rows,
    write_pixel_file,
)
from cache_tools.decoding.service import load_canvases
from cache_tools.errors import DataError, FormatError
from cache_tools.images.decode import decoded_size
from cache_tools.images.encoded import EncodedImages
from cache_tools.images.formats import decoder_versions
from cache_tools.images.index import PROGRESS_FROM_FILES, num_workers
from cache_tools.units import human_bytes

AT_ONCE = 64  # pictures that are decoded before they are written
_SAMPLED = 256  # pictures whose sizes are looked at to estimate the size of all
_LOCK, _ABANDONED_S, _WAIT_S = ".lock", 60.0, 0.2
_FULL = {errno.ENOSPC, errno.EDQUOT}


class NoRoomError(Exception):
    """Pixels cannot be kept on the disk; the text says why, as the end of a sentence."""


def find_packed(images: EncodedImages, *, canvases: bool) -> PackedImages | None:
    """The same images, read from a pixel file that holds all of them; None if there is none that can be used.

    Args:
        canvases: whether their canvases are needed, or the pictures at their own size.
    """
    settings = pixel_settings(images, canvases=canvases)
    prefix = f"{_digest(json.dumps(settings, sort_keys=True).encode())}-"
    try:
        names = [name for name in pixel_files().names() if name.startswith(prefix) and name.endswith(SUFFIX)]
    except OSError:  # there are none, or the home cannot be read
        return None
    own = _name(images, settings) if len(names) > 1 else ""
    for name in sorted(names, key=lambda name: name != own):
        try:
            file = open_pixel_file(name)
        except FormatError as error:
            warn(f"{error}")
            continue
        except OSError:  # removed meanwhile, or not readable
            continue
        places = file.places_of(images.keys) if file.settings == settings else None
        if places is not None:
            with suppress(OSError):  # a home that is read-only; `prune` takes this as the time of the last reading
                os.utime(file.path)
            return PackedImages.of(images, file, places, canvases=canvases)
    return None


def make_packed(images: EncodedImages, *, canvases: bool, budget: int) -> PackedImages:
    """`find_packed`, after making the pixel file if there is none. Waits for another process that makes one.

    Args:
        budget: bytes that all pixel files of the cache home may take together.

    Raises:
        NoRoomError: they would take more, or the disk is full. Nothing is left of the file.
        DataError: a picture that cannot be read or decoded.
        StorageError: the cache home cannot be written.
    """
    files = pixel_files()
    try:
        files.make_folder()
        with _lock():
            if (found := find_packed(images, canvases=canvases)) is not None:
                return found
            files.remove_partials(age_s=_ABANDONED_S)  # of killed processes: who writes holds the lock
            _make(images, canvases=canvases, budget=budget)
    except TooLargeError:
        raise NoRoomError(f"the pictures take more than --pixel-disk {option_size(budget)} leaves") from None
    except OSError as error:
        if error.errno in _FULL:
            raise NoRoomError(f"the disk of {files.path} was full before all were written") from error
        raise storage_error(error) from error
    found = find_packed(images, canvases=canvases)
    assert found is not None, "it has just been written"
    return found


def pack_in_memory(images: EncodedImages) -> PackedImages | None:
    """The pictures of images at their own size, decoded into memory; None where they take more than `packed_bytes`."""
    rows = unique_rows(images.keys)
    settings, limit = pixel_settings(images, canvases=False), packed_bytes(images, canvases=False)
    is_long = len(rows) >= PROGRESS_FROM_FILES
    with Progress("load images", len(rows), "images") if is_long else nullcontext() as progress:
        pictures = _decoded(images, rows, progress, canvases=False)
        try:
            file = pixel_file_in_memory(settings, images.keys[rows], pictures, limit=limit + limit // 4)
        except TooLargeError:
            return None
    places = file.places_of(images.keys)
    assert places is not None, "it has all of them"
    return PackedImages.of(images, file, places, canvases=False)


def packed_bytes(images: EncodedImages, *, canvases: bool) -> int:
    """The size of a pixel file; for pictures of their own sizes without an index, estimated from a few headers."""
    rows = unique_rows(images.keys)
    height, width = images.image_size
    of_pixels = 3 * height * width * len(rows) if canvases else _bytes_of_pictures(images, rows)
    return file_bytes(len(rows), of_pixels)


def option_size(count: int) -> str:
    """A size that is not below this one, as an option takes it: `13GB`."""
    unit, name = (10**9, "GB") if count >= 10**10 else (10**6, "MB")
    return f"{-(-count // unit)}{name}"


def pixel_settings(images: EncodedImages, *, canvases: bool) -> dict[str, Any]:
    """What determines the pixels of images besides the content of their files, as plain data."""
    values: dict[str, Any] = {
        "kind": "canvas" if canvases else "pictures",
        "background": images.rules.background,
        "value_range": images.rules.value_range,
        "decoder": decoder_versions(),
    }
    if canvases:
        values |= {"size": images.image_size, "interpolation": images.interpolation}
    elif images.rules.needed is not None:
        values["needed"] = images.rules.needed
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _make(images: EncodedImages, *, canvases: bool, budget: int) -> None:
    files, settings = pixel_files(), pixel_settings(images, canvases=canvases)
    name, rows = _name(images, settings), unique_rows(images.keys)
    needed, taken = packed_bytes(images, canvases=canvases), _taken(name)
    if needed > budget:
        raise NoRoomError(f"--pixel-disk {option_size(needed)} would keep them")
    if needed > budget - taken:
        raise NoRoomError(f"other pixel files take {human_bytes(taken)} of --pixel-disk {option_size(budget)}")
    free = shutil.disk_usage(files.path).free
    if needed > free:
        raise NoRoomError(f"only {human_bytes(free)} are free on the disk of {files.path}")
    progress = Progress(f"decode once for {files.path / name}", len(rows), "images", summary=True)
    with progress:
        pictures = _decoded(images, rows, progress, canvases=canvases)
        write_pixel_file(name, settings, images.keys[rows], pictures, limit=budget - taken)


def _decoded(
    images: EncodedImages, rows: npt.NDArray[np.int64], progress: Progress | None, *, canvases: bool
) -> Iterator[npt.NDArray[np.uint8]]:
    """The pictures of these rows, one after the other, as a pixel file holds them."""
    load = load_canvases(images if len(rows) == len(images) else images.subset(rows)) if canvases else None
    for start in range(0, len(rows), AT_ONCE):
        if load is not None:
            yield from load(slice(start, start + AT_ONCE))
        else:
            pictures = images.pictures(rows[start : start + AT_ONCE])
            yield from (picture.transpose(1, 2, 0) for picture in pictures)
        if progress is not None:
            progress.advance(min(AT_ONCE, len(rows) - start))


@contextmanager
def _lock() -> Iterator[None]:
    """Hold the lock of the folder; processes that make other files wait too, so that a budget is counted once."""
    with ExitStack() as stack:
        is_told = False
        while True:
            try:
                stack.enter_context(pixel_files().lock(_LOCK))
                break
            except BlockingIOError:
                if not is_told:
                    print_line(f"waiting for another process that writes to {pixel_files().path}", file=sys.stderr)
                    is_told = True
                time.sleep(_WAIT_S)
        yield


def _taken(name: str) -> int:
    """Bytes of the pixel files in the cache home but this one."""
    files = pixel_files()
    others = [each for each in files.names() if each.endswith(SUFFIX) and each != name]
    found = [files.status(each) for each in others]
    return sum(status.st_size for status in found if status is not None)


def _bytes_of_pictures(images: EncodedImages, rows: npt.NDArray[np.int64]) -> int:
    """Bytes of decoded pictures: by the index if it knows all sizes, else from the headers of evenly spaced ones.

    An estimate is rather too large than too small.
    """
    known = images.header_sizes() if images.rules.needed is None else None
    if known is not None and (known[rows] > 0).all():
        return int(3 * known[rows].astype(np.float64).prod(axis=1).sum())  # an index that came along may say anything

    def size(row: int) -> int:
        try:
            height, width = decoded_size(images.read(row), images.rules)
        except DataError:  # decoding it reports what is wrong
            return 0
        return 3 * height * width

    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, _SAMPLED).round().astype(np.int64))]
    with ThreadPoolExecutor(num_workers()) as pool:
        sizes = np.array(list(pool.map(size, chosen.tolist())))
    error = 0.0 if len(chosen) == len(rows) else float(sizes.std()) / len(chosen) ** 0.5
    return round(len(rows) * (float(sizes.mean()) + 2.0 * error))


def _name(images: EncodedImages, settings: dict[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True).encode()
    return f"{_digest(text)}-{_digest(images.keys[unique_rows(images.keys)].tobytes())}{SUFFIX}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
