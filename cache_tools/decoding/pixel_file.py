"""Decoded pixels of a split in one file of the cache home: a pixel file.

A pixel file holds the pictures one after the other, at the size of a canvas (uint8 [3, H, W]) or at their own (uint8
[H, W, 3]), and then an index: content keys, sizes, places and checksums. It appears in the cache home when it is
complete. A picture is read with one system call, which for files in the page cache is faster than through a memory map,
and which reports a file that has been cut since, where a memory map would end the process. Its checksum is compared
when a process reads the picture for the first time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from cache_tools.errors import DataError, FormatError
from cache_tools.files import SafeFolder, cache_home
from cache_tools.images.decode import MAX_PIXELS
from cache_tools.images.image_set import KEY_BYTES
from cache_tools.images.index import FileState

FOLDER, SUFFIX = "pixels", ".pixels"  # in the cache home
_MAGIC, _VERSION, _START = b"TCPIXELS", 1, 4096
_GOES_ON = "run the same command again: it opens the file that is there now, or goes on without one"
_OF_PROCESSES = "/proc/"
_READERS = 4  # threads; more than one for files that are not in the page cache
_READ_ALONE = 4 << 20  # bytes that are not worth the threads

Integers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class TooLargeError(Exception):
    """The pictures take more bytes than they may."""


class PackedPicture(NamedTuple):
    """Where another process reads a picture from a pixel file.

    Attributes:
        file: its path.
        inode: (device, number), which tell it from another file that has replaced it.
        start: of the picture's pixels in the file, uint8 [height, width, 3].
    """

    file: str
    inode: tuple[int, int]
    start: int
    height: int
    width: int
    checksum: int


class PixelIndex(NamedTuple):
    """The pictures of a pixel file.

    Attributes:
        keys: uint8 [M, 16], content keys, each once.
        sizes: int32 [M, 2], height and width.
        starts: int64 [M], where their pixels begin in the file.
        checksums: uint32 [M], CRC-32 of their pixels.
    """

    keys: Bytes
    sizes: npt.NDArray[np.int32]
    starts: Integers
    checksums: npt.NDArray[np.uint32]

    def to_bytes(self) -> bytes:
        columns = zip(self, _COLUMNS, strict=True)
        return b"".join(np.ascontiguousarray(column, kind).tobytes() for column, (kind, _) in columns)

    @classmethod
    def from_bytes(cls, data: bytes, count: int) -> PixelIndex:
        columns, start = [], 0
        for kind, width in _COLUMNS:
            column = np.frombuffer(data, kind, count * width, start)
            start += column.nbytes
            columns.append(column.reshape(count, width) if width > 1 else column)
        return cls(*columns)


_COLUMNS = (("u1", KEY_BYTES), ("<i4", 2), ("<i8", 1), ("<u4", 1))
_ROW_BYTES = KEY_BYTES + 8 + 8 + 4


class PixelFile:
    """An open pixel file. Any thread may read from it.

    Args:
        file: closed with this object.
        path: under which another process opens it.

    Raises:
        FormatError: it is damaged, or of another version.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self.path = file, path
        try:
            self.size_bytes, self.settings, self.index = self._read_index()
        except BaseException:
            self._file.close()
            raise
        self._inode = _inode_of(self._file.fileno())
        self._checked = np.zeros(len(self.index.keys), np.bool_)

    def places_of(self, keys: Bytes) -> Integers | None:
        """Where the pictures with these content keys are in the index, int64 [N]; None unless all of them are."""
        if np.array_equal(self.index.keys, keys):
            return np.arange(len(keys), dtype=np.int64)
        own, wanted = _as_words(self.index.keys), _as_words(keys)
        order = np.argsort(own, kind="stable")
        places = order[np.searchsorted(own, wanted, sorter=order).clip(max=len(own) - 1)]
        return places.astype(np.int64) if bool((own[places] == wanted).all()) else None

    def read_canvases(self, places: Integers, out: Bytes) -> None:
        """Read pictures of one size into `out`, uint8 [B, 3, H, W], with a system call for those that are neighbours.

        Raises:
            DataError: the file is damaged.
        """
        rows = out.reshape(len(out), -1)

        def read(part: Integers) -> None:
            for run in np.split(part, np.flatnonzero(np.diff(places[part]) != 1) + 1):
                self._read(places[run], rows[run[0] : run[-1] + 1])

        _in_threads(read, len(places), out.nbytes)

    def pictures(self, places: Integers) -> list[Bytes]:
        """Pictures of any size, uint8 [H, W, 3].

        Raises:
            DataError: the file is damaged.
        """
        made = [np.empty((*self.index.sizes[place].tolist(), 3), np.uint8) for place in places]

        def read(part: Integers) -> None:
            for row in part:
                self._read(places[row : row + 1], made[row].reshape(1, -1))

        _in_threads(read, len(places), sum(picture.nbytes for picture in made))
        return made

    def place(self, place: int) -> PackedPicture:
        """What another process needs to read the picture at a place of the index."""
        height, width = self.index.sizes[place].tolist()
        start, checksum = int(self.index.starts[place]), int(self.index.checksums[place])
        return PackedPicture(str(self.path), self._inode, start, height, width, checksum)

    def _read(self, places: Integers, rows: Bytes) -> None:
        """Read neighbours into `rows`, uint8 [B, bytes of a picture]."""
        _read_whole(self._file.fileno(), rows, int(self.index.starts[places[0]]), self.path)
        if not self._checked[places].all():
            for place, row in zip(places, rows, strict=True):
                if zlib.crc32(row.data) != self.index.checksums[place]:
                    raise _damaged(self.path, f"other pixels than were written, from byte {self.index.starts[place]}")
            self._checked[places] = True

    def _read_index(self) -> tuple[int, dict[str, Any], PixelIndex]:
        size = os.fstat(self._file.fileno()).st_size
        head = self._file.read(_START)
        try:
            if head[: len(_MAGIC)] != _MAGIC:
                raise ValueError("no pixel file")
            (length,) = struct.unpack_from("<I", head, len(_MAGIC))
            header = json.loads(head[len(_MAGIC) + 4 :][:length])
            if header["version"] != _VERSION:
                raise ValueError(f"version {header['version']}")
            count, start = int(header["count"]), int(header["index_start"])
            if count < 1 or start < _START or start + count * _ROW_BYTES != size:
                raise ValueError(f"{size:,} bytes")
            self._file.seek(start)
            data = self._file.read(count * _ROW_BYTES)
            if hashlib.blake2b(data, digest_size=16).hexdigest() != header["index_digest"]:
                raise ValueError("an index with another digest")
            index = PixelIndex.from_bytes(data, count)
            lengths = 3 * index.sizes.astype(np.int64).prod(axis=1)
            ends = index.starts + lengths
            if (
                index.sizes.min() < 1
                or index.sizes.max() > MAX_PIXELS
                or index.starts[0] != _START
                or ends[-1] != start
            ):
                raise ValueError("pictures outside of the file")
            if (ends[:-1] != index.starts[1:]).any():
                raise ValueError("pictures that overlap")
            return size, dict(header["settings"]), index
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError, struct.error) as error:
            raise FormatError(
                "a damaged pixel file, or one of another version",
                where=self.path,
                found=error,
                next_step="remove it: it is made again where --pixel-disk allows it",
            ) from error


def file_bytes(count: int, pixel_bytes: int) -> int:
    """The size of a pixel file of so many pictures, with so many bytes of pixels in all."""
    return _START + pixel_bytes + count * _ROW_BYTES


def unique_rows(keys: Bytes) -> Integers:
    """The first row of each content key, int64 [M], in order."""
    _, first = np.unique(_as_words(keys), return_index=True)
    return np.sort(first).astype(np.int64)


def pixel_files() -> SafeFolder:
    """The folder of pixel files in the cache home, where other users may also write; links in it are not followed."""
    return SafeFolder(cache_home()).below(FOLDER)


def open_pixel_file(name: str) -> PixelFile:
    """Open a file in the folder of pixel files.

    Raises:
        FileNotFoundError: no such file.
        FormatError: it is damaged, or of another version.
    """
    return PixelFile(pixel_files().open_read(name), pixel_files().path.absolute() / name)


def write_pixel_file(
    name: str, settings: Mapping[str, Any], keys: Bytes, pictures: Iterator[Bytes], *, limit: int
) -> None:
    """Write a pixel file, which appears under its name when all of it is on the disk.

    Args:
        settings: what determines the pixels besides the content of the files, as plain data.
        keys: uint8 [M, 16], of the pictures.
        pictures: uint8 [3, H, W] for canvases or [H, W, 3], in this order.
        limit: bytes that the file may take.

    Raises:
        TooLargeError: it would take more. Nothing is left.
        OSError: as `SafeFolder.replaced_durably`.
    """
    with pixel_files().replaced_durably(name) as file:
        _write(file, settings, keys, pictures, limit)


def pixel_file_in_memory(
    settings: Mapping[str, Any], keys: Bytes, pictures: Iterator[Bytes], *, limit: int
) -> PixelFile:
    """A pixel file without a name in memory, which is free again when the object is gone, or the process.

    Arguments and errors are those of `write_pixel_file`.
    """
    file = os.fdopen(os.memfd_create("pixels"), "w+b")
    try:
        _write(file, settings, keys, pictures, limit)
        file.flush()
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return PixelFile(file, Path(f"{_OF_PROCESSES}{os.getpid()}/fd/{file.fileno()}"))


def read_picture(picture: PackedPicture, known: FileState) -> tuple[Bytes, FileState]:
    """Read a picture in a process that has only its place, uint8 [H, W, 3], and the state of the file.

    Args:
        known: state of the file in which the picture was checked before; then it is not checked again.

    Raises:
        DataError: the file is gone or damaged.
    """
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    in_memory = picture.file.startswith(_OF_PROCESSES)  # opened each time, so that the memory can become free
    try:
        file = os.open(picture.file, os.O_RDONLY) if in_memory else _opened(picture.file, picture.inode)
        try:
            state = FileState.of(os.fstat(file))
            _read_whole(file, pixels.reshape(1, -1), picture.start, picture.file)
        finally:
            if in_memory:
                os.close(file)
    except OSError as error:
        raise DataError(
            "cannot read a pixel file", where=picture.file, found=error.strerror or error, next_step=_GOES_ON
        ) from error
    if state != known and zlib.crc32(pixels.data) != picture.checksum:
        raise _damaged(picture.file, f"other pixels than were written, from byte {picture.start}")
    return pixels, state


@functools.lru_cache(maxsize=64)
def _opened(file: str, inode: tuple[int, int]) -> int:
    path = Path(file)
    with SafeFolder(path.parent.parent).below(path.parent.name).open_read(path.name) as opened:
        if _inode_of(opened.fileno()) != inode:
            raise DataError("another process has replaced a pixel file", where=path, next_step=_GOES_ON)
        return os.dup(opened.fileno())


def _write(file: BinaryIO, settings: Mapping[str, Any], keys: Bytes, pictures: Iterator[Bytes], limit: int) -> None:
    sizes, starts = np.empty((len(keys), 2), np.int32), np.empty(len(keys), np.int64)
    checksums, is_canvas = np.empty(len(keys), np.uint32), settings["kind"] == "canvas"
    file.write(bytes(_START))
    place, after = _START, len(keys) * _ROW_BYTES
    for row, pixels in zip(range(len(keys)), pictures, strict=True):
        data = np.ascontiguousarray(pixels).reshape(-1).data
        if place + data.nbytes + after > limit:
            raise TooLargeError
        sizes[row], starts[row] = pixels.shape[1:] if is_canvas else pixels.shape[:2], place
        checksums[row] = zlib.crc32(data)
        file.write(data)
        place += data.nbytes
    index = PixelIndex(keys, sizes, starts, checksums).to_bytes()
    file.write(index)
    digest = hashlib.blake2b(index, digest_size=16).hexdigest()
    header = {"version": _VERSION, "count": len(keys), "index_start": place, "index_digest": digest}
    encoded = json.dumps(header | {"settings": settings}).encode()
    assert len(encoded) <= _START - len(_MAGIC) - 4, "settings are small"
    file.seek(0)
    file.write(_MAGIC + struct.pack("<I", len(encoded)) + encoded)


def _inode_of(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_dev, status.st_ino


def _read_whole(file: int, rows: Bytes, start: int, path: object) -> None:
    """Fill contiguous `rows` from a place in a file."""
    buffer = rows.reshape(-1).data
    done = 0
    try:
        while done < len(buffer):
            count = os.preadv(file, [buffer[done:]], start + done)
            if count == 0:
                raise _damaged(path, "a shorter file than when it was opened")
            done += count
    except OSError as error:
        raise DataError("cannot read a pixel file", where=path, found=error.strerror or error) from error


def _in_threads(read: Callable[[Integers], None], count: int, size_bytes: int) -> None:
    """Call `read` with the numbers 0 … count − 1, in a few parts if there is much to read."""
    numbers = np.arange(count, dtype=np.int64)
    if count == 0:
        return
    if count == 1 or size_bytes < _READ_ALONE:
        read(numbers)
    else:
        list(_readers(os.getpid()).map(read, np.array_split(numbers, min(_READERS, count))))


@functools.lru_cache(maxsize=1)
def _readers(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READERS, thread_name_prefix="pixel-file")


def _as_words(keys: Bytes) -> npt.NDArray[np.void]:
    return np.ascontiguousarray(keys).view(np.dtype((np.void, KEY_BYTES))).reshape(-1)


def _damaged(path: object, found: str) -> DataError:
    return DataError(
        "a damaged pixel file",
        where=path,
        found=found,
        next_step="remove it, and run the same command again: the file is made again where --pixel-disk allows it",
    )
