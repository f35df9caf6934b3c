"""The tar shards of a data set: which files a split has, on the disk or in an object store, and reading from them."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from cache_tools.console import Progress
from cache_tools.errors import CacheError, DataError
from cache_tools.files import SafeFolder, cache_home
from cache_tools.images.class_names import listed
from cache_tools.storage import RemotePlace, open_place, remote_url
from cache_tools.system.arguments import expand_user
from cache_tools.units import human_bytes

COPIES = "shards"  # folder in the cache home
PACK_INDEX, PACK_RECORD, CLASSES = "index.parquet", "pack.json", "classes.json"
MAX_SHARDS = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
_NUMBER = re.compile(r"(?:[-_.]?[0-9]+)+(?:-of-[0-9]+)?")
_PIECE = 16 << 20  # bytes of one request to an object store
_MAX_OPEN = 256  # files


@dataclass(frozen=True)
class Shard:
    """A tar file.

    Attributes:
        name: relative to the place of the data set.
        state: what tells this content from others under the name: size and times, or an object store's tag.
        path: of the file, or of its local copy; None for one that is read from the object store.
        changed_ns: when it was last changed; 0 for one in an object store.
    """

    name: str
    size: int
    state: str
    path: Path | None
    changed_ns: int = 0


@dataclass(frozen=True)
class ShardPlace:
    """Where the shards of a split are: a folder or the URL of one, and a pattern of names in it.

    Attributes:
        names: such as `train-*.tar` or `a/{000..009}.tar`; None for the files of a split by its name.
    """

    folder: str
    names: str | None
    split: str

    @property
    def is_remote(self) -> bool:
        return remote_url(self.folder) is not None

    @cached_property
    def store(self) -> RemotePlace:
        """The object store of a remote place."""
        place = open_place(self.folder)
        assert isinstance(place, RemotePlace)
        return place

    def __str__(self) -> str:
        return f"{self.folder}/{self.names or f'{self.split}-*.tar'}"

    def read(self, name: str, limit: int) -> bytes | None:
        """A small file beside the shards; None if there is none."""
        try:
            if self.is_remote:
                return self.store.read(name, limit)
            with open(os.path.join(self.folder, name), "rb") as file:
                return file.read(limit)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except CacheError:  # an HTTP server may refuse names that it does not have
            return None


def shard_place(data_dir: Path | str, split: str) -> ShardPlace:
    """Where the shards of a split are.

    `data_dir` is a folder, a URL, or a pattern of tar files in one; so may be the split.
    """
    where = remote_url(data_dir) or str(expand_user(data_dir))
    if is_pattern(split):
        pattern = remote_url(split) or str(expand_user(split))
        if remote_url(pattern) is None and not os.path.isabs(pattern):
            pattern = f"{os.path.dirname(where) if is_pattern(where) else where.rstrip('/')}/{pattern}"
        return _split_pattern(pattern, split)
    if is_pattern(where):
        return _split_pattern(where, split)
    return ShardPlace(where.rstrip("/") or "/", None, split)


def is_pattern(place: Path | str) -> bool:
    """Whether a place or a split names tar files, and no folder or split of one."""
    return str(place).endswith(".tar")


def split_of(name: str) -> str:
    """The split that a shard belongs to by its name: `train` of `train-000017.tar` and of `train/000017.tar`."""
    folder, _, file = name.rpartition("/")
    stem = _NUMBER.sub("", file.removesuffix(".tar"))
    return stem.rstrip("-_.") or folder.rpartition("/")[2] or "train"


def has_shards(folder: Path) -> bool:
    """Whether a folder holds tar shards: tar files and no sub-folders, or sub-folders that each hold tar files.

    An archive that was left beside class folders is none.
    """
    if (folder / PACK_RECORD).is_file():
        return True
    inside = [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir()]
    folders = inside or [folder]
    return all(any(path.glob("*.tar")) and not any(each.is_dir() for each in path.iterdir()) for path in folders)


def find_shards(place: ShardPlace, *, copies: bool) -> list[Shard]:
    """The shards of a split, sorted by name; those that braces list, in that order.

    Args:
        copies: whether remote shards are copied to the cache home.

    Raises:
        DataError: there are none, or one that braces name is missing.
    """
    if place.names is not None and not any(sign in place.names for sign in "*?"):
        names = expand_braces(place.names, place)
        found = [_look_at(place, name) for name in names]
        if missing := [name for name, shard in zip(names, found, strict=True) if shard is None]:
            raise DataError(
                f"{len(missing):,} of {len(names):,} shards are missing",
                where=place.folder,
                expected=place.names,
                found=f"no {listed(missing)}",
                next_step="copy them there, or correct the pattern",
            )
        shards = [shard for shard in found if shard is not None]
    else:
        shards = _search(place)
    return [_with_copy(place, shard) for shard in shards] if place.is_remote and copies else shards


def expand_braces(pattern: str, where: object) -> list[str]:
    """`{000..002}` and `{a,b}` written out, as shells do.

    Raises:
        DataError: braces without a meaning, or too many names.
    """
    names = [pattern]
    while match := _BRACES.search(names[0]):
        numbers = _RANGE.fullmatch(match[1])
        if numbers is not None:
            first, last = int(numbers[1]), int(numbers[2])
            width = len(numbers[1]) if numbers[1].startswith("0") else 0
            count = last - first + 1
            parts = [f"{number:0{width}}" for number in range(first, last + 1)] if 0 < count <= MAX_SHARDS else []
        else:
            parts = match[1].split(",") if "," in match[1] else []
        if not parts or len(parts) * len(names) > MAX_SHARDS:
            raise DataError(
                "cannot read the braces of a pattern of shards",
                where=where,
                expected="{000..017} or {train,extra}",
                found=f"{{{match[1]}}}",
            )
        names = [_BRACES.sub(lambda _, part=part: part, name, count=1) for name in names for part in parts]  # type: ignore[misc]
    if "{" in names[0] or "}" in names[0]:
        raise DataError("cannot read the braces of a pattern of shards", where=where, found=pattern)
    return names


class ShardReader:
    """Reads parts of shards. It may be used by several threads, and pickled.

    Args:
        place: of the data set.
    """

    def __init__(self, place: ShardPlace, shards: Sequence[Shard]) -> None:
        self.place, self.shards = place, tuple(shards)
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "shards": self.shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def read(self, shard: int, start: int, size: int) -> bytes:
        """Bytes of a shard.

        Raises:
            DataError: the shard cannot be read, or ends before.
        """
        one = self.shards[shard]
        if start + size > one.size:
            raise DataError(
                "a shard is shorter than its index says", where=self.where(shard), found=f"{one.size:,} bytes"
            )
        try:
            data = self._read_store(one, start, size) if one.path is None else self._read_file(shard, start, size)
        except OSError as error:
            raise DataError("cannot read a shard", where=self.where(shard), found=error.strerror or error) from error
        if len(data) != size:
            raise DataError("a shard is shorter than before", where=self.where(shard), expected=f"{one.size:,} bytes")
        return data

    def where(self, shard: int) -> str:
        """The path or URL of a shard, for messages."""
        return f"{self.place.folder}/{self.shards[shard].name}"

    def _read_store(self, shard: Shard, start: int, size: int) -> bytes:
        return self.place.store.read_range(shard.name, start, size)

    def _read_file(self, shard: int, start: int, size: int) -> bytes:
        path = self.shards[shard].path
        assert path is not None
        with self._lock:
            descriptor = self._open.get(shard)
            if descriptor is None and len(self._open) < _MAX_OPEN:
                descriptor = self._open[shard] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        if descriptor is not None:
            return _read_all(descriptor, start, size)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            return _read_all(descriptor, start, size)
        finally:
            os.close(descriptor)


def open_shard(place: ShardPlace, shard: Shard) -> BinaryIO:
    """A whole shard as a file that is read from the front; of one in an object store, a few MB at a time."""
    if shard.path is not None:
        return shard.path.open("rb", buffering=1 << 20)
    return io.BufferedReader(_RemoteFile(place.store, shard), buffer_size=1 << 16)


class _RemoteFile(io.RawIOBase):
    """A file of an object store, of which the piece that is being read is in memory."""

    def __init__(self, store: RemotePlace, shard: Shard) -> None:
        self._store, self._shard = store, shard
        self._place = self._start = 0
        self._piece = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset + (0, self._place, self._shard.size)[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        inside = self._place - self._start
        if not 0 <= inside < len(self._piece):
            size = max(min(_PIECE, self._shard.size - self._place), 0)
            self._piece, self._start = self._store.read_range(self._shard.name, self._place, size), self._place
            inside = 0
        part = self._piece[inside : inside + len(buffer)]
        buffer[: len(part)] = part
        self._place += len(part)
        return len(part)


def _read_all(descriptor: int, start: int, size: int) -> bytes:
    data = os.pread(descriptor, size, start)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), start + len(data))):
        data += more
    return data


def _split_pattern(pattern: str, split: str) -> ShardPlace:
    """The folder of a pattern, which is what comes before its first sign, and the pattern in it."""
    first = min((pattern.index(sign) for sign in "*?{" if sign in pattern), default=len(pattern))
    folder, _, _ = pattern[:first].rpartition("/")
    return ShardPlace(folder or ("/" if pattern.startswith("/") else "."), pattern[len(folder) :].lstrip("/"), split)


def _look_at(place: ShardPlace, name: str) -> Shard | None:
    """A shard as it is now; None if there is none."""
    if place.is_remote:
        try:
            entry = place.store.entry(name)
        except FileNotFoundError:
            return None
        return Shard(name, entry.size, f"{entry.size} {entry.modified_s} {entry.tag}", None)
    path = Path(place.folder, name)
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    if not path.is_file():
        return None
    text = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    return Shard(name, status.st_size, text, path, status.st_ctime_ns)


def _search(place: ShardPlace) -> list[Shard]:
    """The shards that a pattern or a split fits, sorted by name."""
    if place.is_remote:
        entries = {entry.key: entry for entry in place.store.entries() if entry.key.endswith(".tar")}
        names = sorted(entries)
    else:
        names = sorted(local_shards(Path(place.folder), deep=place.names is not None and "/" in place.names))
    chosen = _chosen(place, names)
    if not chosen:
        raise _no_shards(place, names)
    shards = (
        [_look_at(place, name) for name in chosen]
        if not place.is_remote
        else [
            Shard(
                name, entries[name].size, f"{entries[name].size} {entries[name].modified_s} {entries[name].tag}", None
            )
            for name in chosen
        ]
    )
    return [shard for shard in shards if shard is not None]


def local_shards(folder: Path, *, deep: bool = False) -> Iterator[str]:
    """The names of the tar files in a folder and in its sub-folders; with `deep`, in those below too."""
    patterns = ["**/*.tar"] if deep else ["*.tar", "*/*.tar"]
    for pattern in patterns:
        for path in folder.glob(pattern):
            if not path.name.startswith(".") and path.is_file():
                yield path.relative_to(folder).as_posix()


def _chosen(place: ShardPlace, names: Sequence[str]) -> list[str]:
    if place.names is None:
        return [name for name in names if split_of(name) == place.split]
    patterns = expand_braces(place.names, place)
    return [
        name
        for name in names
        if any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)
    ]


def _no_shards(place: ShardPlace, names: Sequence[str]) -> DataError:
    splits = sorted({split_of(name) for name in names})
    if place.names is None and splits:
        return DataError(
            "the shards have no such split",
            where=place.folder,
            expected=f"files {place.split}-….tar or {place.split}/….tar",
            found=f"the splits {listed(splits)}",
            next_step="set dataset.split or dataset.test_split to one of them, to a pattern such as "
            f"{splits[0]}-{{000000..000009}}.tar, or test_split to a part such as train[80%:] or to null",
        )
    return DataError(
        "no shards",
        where=place,
        expected="tar files",
        found=listed(list(names)) if names else "no tar file in this folder",
        next_step="give their folder or a pattern such as FOLDER/train-*.tar as dataset.data_dir",
    )


def _with_copy(place: ShardPlace, shard: Shard) -> Shard:
    """A shard of an object store with a copy in the cache home, which is made unless it is there."""
    digest = hashlib.blake2b(f"{place.folder}/{shard.name} {shard.state}".encode(), digest_size=12).hexdigest()
    home = SafeFolder(cache_home())
    name = f"{digest}.tar"
    copies = home.below(COPIES)
    status = copies.regular_status(name)
    if status is None or status.st_size != shard.size:
        try:
            _copy(place, shard, copies, name)
        except OSError as error:
            raise DataError(
                "cannot copy a shard to the cache home",
                where=copies.path / name,
                expected=human_bytes(shard.size),
                found=error.strerror or error,
                next_step="make room, set TEACHER_CACHE_HOME to another folder, or read from the store: "
                "--set dataset.remote_shards=read",
            ) from error
    else:
        with suppress(OSError):  # a home that is read-only; `prune` takes this as the time of the last reading
            os.utime(copies.path / name)
    return Shard(shard.name, shard.size, shard.state, copies.path / name)


def _copy(place: ShardPlace, shard: Shard, copies: SafeFolder, name: str) -> None:
    copies.make_folder()
    copies.remove_partials()
    free = shutil.disk_usage(copies.path).free
    if free < shard.size:
        raise OSError(0, f"only {human_bytes(free)} are free")
    progress = Progress(f"copy {shard.name}", shard.size >> 20, "MB")
    with copies.replaced_durably(name) as file, progress:
        for start in range(0, shard.size, _PIECE):
            piece = place.store.read_range(shard.name, start, min(_PIECE, shard.size - start))
            file.write(piece)
            progress.advance(len(piece) >> 20)
        if file.tell() != shard.size:
            raise OSError(0, "the store sent fewer bytes")
