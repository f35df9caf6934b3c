"""The index of a folder: its image files as columns, with their content keys and sizes, stored so that only new files
are read.

A file is known if its path, its size and its times of modification and of change are those of the stored index. Times
that are too young to tell two writes apart are not stored, so a file that is still being written is read again.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from cache_tools.console import Progress
from cache_tools.errors import DataError, FormatError, UnsafeFileError
from cache_tools.files import SafeFolder, cache_home
from cache_tools.images.formats import CAMERA_RAW, EXTENSIONS, HEAD_BYTES, identify, is_decodable, no_decoder
from cache_tools.images.headers import image_size
from cache_tools.images.image_set import KEY_BYTES, sample_key
from cache_tools.system.ranks import own_rank

if TYPE_CHECKING:
    import polars as pl

FOLDER = "indexes"  # in the cache home
PROGRESS_FROM_FILES = 5000
INDEXED_FROM_FILES = 1000  # to hash fewer takes less time than to import polars
_VERSION = 1  # of the stored columns
_SIZES = ("height", "width")
YOUNG_NS = 2_000_000_000  # the coarsest time of change that file systems in use have (FAT), and some skew of clocks
_MAX_BYTES = 4 << 30  # of a stored index
_INT64 = (1 << 63) - 1


class FileColumn(Sequence[Path]):
    """Paths below a folder, as one string of bytes: a million of them take about 40 MB.

    Args:
        root: the folder.
        text: the paths below it in the encoding of the file system, each followed by a zero byte.
        ends: int64 [N], where each path ends in `text`.
        rows: int64 [M], which paths the column has and in which order; None for all of them.
    """

    def __init__(
        self, root: Path, text: bytes, ends: npt.NDArray[np.int64], rows: npt.NDArray[np.int64] | None = None
    ) -> None:
        self.root, self._text, self._ends = root, text, ends
        self._rows = np.arange(len(ends), dtype=np.int64) if rows is None else rows

    @classmethod
    def of(cls, root: Path, paths: Iterable[str]) -> FileColumn:
        """The column of some paths relative to `root`."""
        text = os.fsencode("\0".join([*paths, ""]))
        return cls(root, text, np.flatnonzero(np.frombuffer(text, np.uint8) == 0))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, row: int) -> Path: ...

    @overload
    def __getitem__(self, row: slice | npt.NDArray[np.int64]) -> FileColumn: ...

    def __getitem__(self, row: int | slice | npt.NDArray[np.int64]) -> Path | FileColumn:
        if isinstance(row, slice | np.ndarray):
            return FileColumn(self.root, self._text, self._ends, self._rows[row])
        return self.root / self.relative(row)

    def relative(self, row: int) -> str:
        """A path as it is below the root."""
        place = self._rows[row]
        start = 0 if place == 0 else self._ends[place - 1] + 1
        return os.fsdecode(self._text[start : self._ends[place]])


class FileState(NamedTuple):
    """What the file system says of a file: its size, its times in nanoseconds, and what hard links have in common."""

    size: int
    modified_ns: int
    changed_ns: int
    device: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        return cls(
            status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_dev & _INT64, status.st_ino & _INT64
        )

    @property
    def is_settled(self) -> bool:
        """Whether a later write would have given other times."""
        return self.changed_ns < time.time_ns() - YOUNG_NS


UNKNOWN = FileState(-1, -1, -1, 0, 0)


class FoundFiles:
    """Files that a walk through a folder found.

    Attributes:
        paths: below the root.
        states: int64 [N, 5], a `FileState` for each.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths: list[str] = []
        self._states: list[npt.NDArray[np.int64]] = []

    def add(self, paths: Sequence[str], states: Sequence[FileState]) -> None:
        self.paths += paths
        self._states.append(np.array(states, np.int64).reshape(-1, len(UNKNOWN)))

    @property
    def states(self) -> npt.NDArray[np.int64]:
        return np.concatenate(self._states) if self._states else np.empty((0, len(UNKNOWN)), np.int64)


class Contents(NamedTuple):
    """What the files of a walk hold.

    Attributes:
        keys: uint8 [N, 16], content keys; zeros where the file is no sample.
        sizes: int32 [N, 2], height and width as the headers say, before a picture is turned upright; zeros where the
            header cannot be read, or where an index of an older version has none.
        reasons: row → why the file is no sample.
    """

    keys: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int32]
    reasons: dict[int, str]


def examine(found: FoundFiles, *, kind: str) -> Contents:
    """Which of the files are images, their content keys and sizes. Reads only what the stored index does not know.

    Args:
        kind: of walk; each kind has an index of its own.
    """
    path = cache_home() / FOLDER / f"{_digest(found.root, kind)}.parquet"
    is_indexed = len(found.paths) >= INDEXED_FROM_FILES
    stored = _load(path) if is_indexed else None
    keys, sizes, formats = _look_up(found, stored)
    new = [row for row, name in enumerate(formats) if name is None]
    reasons: dict[int, str] = {}
    for row, content in zip(new, _read(found, new), strict=True):
        if content.reason is not None:
            reasons[row] = content.reason
        else:
            keys[row] = np.frombuffer(content.key, np.uint8)
            sizes[row] = content.size
            formats[row] = content.format
    added = any(formats[row] is not None for row in new)
    if is_indexed and (added or (0 if stored is None else len(stored)) != len(found.paths) - len(new)):
        _store(path, found, keys, sizes, formats)
    return Contents(keys, sizes, reasons)


def read_image(path: Path) -> bytes:
    """Read a regular file; a pipe or device named like an image would block forever.

    Raises:
        DataError: the file is empty, unreadable or no regular file.
    """
    try:
        data = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise DataError("cannot read an image", where=path, found=error.strerror) from error
    if not data:
        raise DataError(
            "not an image",
            where=path,
            found="an empty file" if data is not None else "a broken link, a loop of links or no regular file",
            next_step="replace the file, or remove it from the folder",
        )
    return data


def reason_to_leave_out(path: Path) -> str | None:
    """Why a file is no sample, from its first bytes; None for an image, or a link to a folder that is lost."""
    if path.suffix.lower() in CAMERA_RAW:
        return no_decoder("camera raw")
    if not path.exists():
        return None
    try:
        if not path.is_file():
            return "no regular file"
        with path.open("rb") as file:
            content = identify(file.read(HEAD_BYTES))
    except OSError as error:
        return f"unreadable: {error.strerror}"
    if not content.is_image:
        return None if _is_image_name(path.name) else content.name
    return None if is_decodable(content.name) else no_decoder(content.name)


_own_cores: int | None = None


def use_cores(count: int) -> None:
    """Let this process read and decode on so many cores, because others need the rest of the machine."""
    global _own_cores
    _own_cores = count


def num_workers() -> int:
    """Threads for reading and decoding; the ranks of a machine share its cores."""
    if _own_cores is not None:
        return min(32, _own_cores)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(32, max(cores // own_rank().local_count, 1))


class _Content(NamedTuple):
    """What a file holds: the key, format and size of an image, or the reason to leave it out.

    `format` is None for a file that promises an image and holds none: a check of the images names it, and it is read
    again the next time.
    """

    key: bytes = b""
    format: str | None = None
    reason: str | None = None
    size: tuple[int, int] = (0, 0)


def _read(found: FoundFiles, rows: Sequence[int]) -> Iterator[_Content]:
    """The contents of files. Of hard links with the same ending one is read for all."""
    groups: dict[object, int] = {}  # identity → its first row
    states = found.states[list(rows)]
    first = []
    for row, state in zip(rows, map(FileState._make, states.tolist()), strict=True):
        ending = os.path.splitext(found.paths[row])[1].lower()
        first.append(groups.setdefault((state, ending) if state.inode else row, row))
    shown = Progress("hash images", len(rows), "files") if len(rows) >= PROGRESS_FROM_FILES else nullcontext()
    done: dict[int, _Content] = {}
    with ThreadPoolExecutor(num_workers()) as pool, shown as progress:
        results = pool.map(_examine_file, (found.root / found.paths[row] for row in groups.values()))
        for row, leader in zip(rows, first, strict=True):
            if leader not in done:
                done[leader] = next(results)
            content = done[leader]
            if row != leader and content.format is None and content.reason is None:
                content = _examine_file(found.root / found.paths[row])  # its key depends on the name
            yield content
            if progress is not None:
                progress.advance(1)


def _examine_file(path: Path) -> _Content:
    if not _is_image_name(path.name) and (reason := reason_to_leave_out(path)) is not None:
        return _Content(reason=reason)
    try:
        data = read_image(path)
    except DataError as error:
        # A check of the images names the file.
        return _Content(sample_key(f"{error.found} {path.name}".encode(errors="surrogateescape")))
    content = identify(data[:HEAD_BYTES])
    if not content.is_image:
        return _Content(sample_key(data))
    if not is_decodable(content.name):
        return _Content(reason=no_decoder(content.name))
    return _Content(sample_key(data), content.name, size=image_size(data))


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _digest(root: Path, kind: str) -> str:
    """The name of the index of a folder."""
    text = f"{_VERSION} {kind} {os.path.realpath(root)}"
    return hashlib.blake2b(os.fsencode(text), digest_size=16).hexdigest()


def _columns(found: FoundFiles) -> pl.DataFrame:
    import polars as pl

    states = found.states
    numbers = {name: states[:, place] for place, name in enumerate(FileState._fields) if name in _schema()}
    paths = os.fsencode("\0".join(found.paths)).split(b"\0") if found.paths else []
    return pl.DataFrame({"path": pl.Series(paths, dtype=pl.Binary), **numbers})


def _schema() -> dict[str, pl.DataType]:
    import polars as pl

    times = ("size", "modified_ns", "changed_ns")
    texts = {"format": pl.String(), "key": pl.Binary()}
    return {"path": pl.Binary(), **{name: pl.Int64() for name in times}, **texts, **dict.fromkeys(_SIZES, pl.Int32())}


def _load(path: Path) -> pl.DataFrame | None:
    """The stored index; None if there is none that can be used. Sizes are zeros in one of an older version."""
    import polars as pl

    try:
        stored = pl.read_parquet(io.BytesIO(_folder(path).read_bytes(path.name, _MAX_BYTES)))
    except (OSError, FormatError, pl.exceptions.PolarsError):
        return None
    if not set(_SIZES) & set(stored.columns):
        stored = stored.with_columns(pl.lit(0, pl.Int32).alias(name) for name in _SIZES)
    whole = dict(stored.schema) == _schema() and not any(stored.null_count().row(0))
    whole = whole and bool((stored["key"].bin.size() == KEY_BYTES).all()) and not stored["path"].is_duplicated().any()
    return stored if whole else None


def _look_up(
    found: FoundFiles, stored: pl.DataFrame | None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32], list[str | None]]:
    """Keys, sizes and formats of the files that the index knows; zeros and None for the others."""
    keys, sizes = np.zeros((len(found.paths), KEY_BYTES), np.uint8), np.zeros((len(found.paths), 2), np.int32)
    if stored is None or not len(stored) or not found.paths:
        return keys, sizes, [None] * len(found.paths)
    import polars as pl

    decodable = [name for name in stored["format"].unique().to_list() if is_decodable(name)]
    stored = stored.filter(pl.col("format").is_in(decodable))
    on = ["path", "size", "modified_ns", "changed_ns"]
    joined = _columns(found).join(stored, on=on, how="left", maintain_order="left")
    known = joined["key"].is_not_null().to_numpy()
    packed = b"".join(joined["key"].drop_nulls().to_list())
    keys[known] = np.frombuffer(packed, np.uint8).reshape(-1, KEY_BYTES)
    for axis, name in enumerate(_SIZES):
        sizes[:, axis] = joined[name].fill_null(0).clip(0).to_numpy()
    return keys, sizes, joined["format"].to_list()


def _store(
    path: Path,
    found: FoundFiles,
    keys: npt.NDArray[np.uint8],
    sizes: npt.NDArray[np.int32],
    formats: Sequence[str | None],
) -> None:
    """Replace the stored index; without a writable home, or with a link in its place, do nothing."""
    import polars as pl

    table = _columns(found).with_columns(
        pl.Series("format", formats, pl.String),
        pl.Series("key", [key.tobytes() for key in keys], pl.Binary),
        *(pl.Series(name, sizes[:, axis]) for axis, name in enumerate(_SIZES)),
    )
    table = table.filter(pl.col("changed_ns") < time.time_ns() - YOUNG_NS).drop_nulls("format")
    buffer = io.BytesIO()
    table.write_parquet(buffer, compression="zstd")
    with suppress(OSError, UnsafeFileError):
        folder = _folder(path)
        folder.make_folder()
        folder.put(path.name, buffer.getbuffer())


def _folder(path: Path) -> SafeFolder:
    """The folder of an index in the cache home, where other users may also write; links in it are not followed."""
    return SafeFolder(path.parent.parent).below(path.parent.name)
