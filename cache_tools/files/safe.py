"""Files below a folder that somebody else may have made: no link is followed, nothing but regular files is opened."""

from __future__ import annotations

import errno
import os
import random
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from cache_tools.errors import FormatError
from cache_tools.files.opened import NewFile, OpenFolder, open_root, require_file
from cache_tools.files.whole import LEFTOVER_AGE_S, is_partial, too_large

_NOT_ENOUGH_FILES = {errno.EMFILE, errno.ENFILE}
_MAX_DEPTH = 32  # of folders to remove; each level takes an open file
_STALE_ATTEMPTS, PATIENCE_S = 8, 10.0

Answer = TypeVar("Answer")


class Entry(NamedTuple):
    """What a name in a folder is; a link is neither a file nor a folder."""

    name: str
    is_file: bool
    is_folder: bool


class SafeFolder:
    """A folder, such as a cache or a run, of which somebody else may have made the content.

    Below it no link is followed, for reading, writing or removing, and only regular files are opened: pipes and devices
    never block. The folder itself may be a link, because the user named it. Names are relative, with `/` between parts.
    Nothing is kept open between calls.

    Every method raises `UnsafeFileError` for a link, pipe, device or socket where a file or folder should be, and
    OSError (with the full path) where the operating system fails. A stale handle of a network share and a lack of
    open files are tried again for a moment first.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path | str) -> None:
        self._root, self._inside = Path(path), tuple[str, ...]()

    @property
    def path(self) -> Path:
        return self._root.joinpath(*self._inside)

    def below(self, name: str) -> SafeFolder:
        """A folder inside, which must not be a link, nor a folder on the way to it."""
        inside = SafeFolder(self._root)
        inside._inside = (*self._inside, *_parts(name))
        return inside

    def __repr__(self) -> str:
        return f"SafeFolder({str(self.path)!r})"

    def status(self, name: str) -> os.stat_result | None:
        """The status of a name, of the link itself if it is one; None if there is nothing."""
        *folders, last = (*self._inside, *_parts(name))

        def look() -> os.stat_result | None:
            try:
                with self._opened(folders) as folder:
                    return folder.status(last)
            except (FileNotFoundError, NotADirectoryError):
                return None

        return _patiently(look)

    def regular_status(self, name: str) -> os.stat_result | None:
        """The status of a file; None if there is none. Raises `UnsafeFileError` for a link."""
        status = self.status(name)
        if status is not None:
            require_file(self.path / name, status)
        return status

    def exists(self, name: str) -> bool:
        """Whether there is anything of this name, be it a dangling link."""
        return self.status(name) is not None

    def is_file(self, name: str) -> bool:
        """Whether this is a regular file; False for a link to one."""
        status = self.status(name)
        return status is not None and stat.S_ISREG(status.st_mode)

    def is_folder(self, name: str) -> bool:
        """Whether this is a folder; False for a link to one."""
        status = self.status(name)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def age_s(self, name: str) -> float:
        """Seconds since this was written; 0 if there is nothing.

        A file from the future, as one looks after the clock was set back, is as old as it lies in the future.
        """
        status = self.status(name)
        return 0.0 if status is None else abs(time.time() - status.st_mtime)

    def names(self, name: str = "") -> list[str]:
        """The names in this folder or in one inside, sorted. Raises FileNotFoundError if there is no such folder."""

        def look() -> list[str]:
            with self._opened(self._chain(name)) as folder, folder.readable() as descriptor:
                return sorted(os.listdir(descriptor))

        return _patiently(look)

    def entries(self, name: str = "") -> list[Entry]:
        """As `names`, with the kind of each, which a folder tells without a look at every file."""

        def look() -> list[Entry]:
            with (
                self._opened(self._chain(name)) as folder,
                folder.readable() as descriptor,
                os.scandir(descriptor) as found,
            ):
                return sorted(
                    Entry(each.name, each.is_file(follow_symlinks=False), each.is_dir(follow_symlinks=False))
                    for each in found
                )

        return _patiently(look)

    def walk(self, name: str = "") -> Iterator[Entry]:
        """Everything below, each under its name from here (`folder/file`), except folders. Links are not entered."""
        folders = [name]
        while folders:
            folder = folders.pop()
            with suppress(FileNotFoundError):  # removed meanwhile
                for entry in self.entries(folder):
                    inside = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_folder:
                        folders.append(inside)
                    else:
                        yield entry._replace(name=inside)

    def read_bytes(self, name: str, limit: int | None = None) -> bytes:
        """Read a whole file.

        Raises:
            FileNotFoundError: no such file.
            FormatError: it has more than `limit` bytes; it is not read.
        """

        def read() -> bytes:
            descriptor = self._descriptor(name, limit)
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                data: bytes = file.read(os.fstat(descriptor).st_size + 1)
                while part := file.read(1 << 16):  # a read may be short, or the file grows
                    data += part
                    if limit is not None and len(data) > limit:
                        raise too_large(self.path / name, limit, len(data))
            return data

        return _patiently(read)

    def open_read(self, name: str, limit: int | None = None) -> BinaryIO:
        """Open a file to read it; raises as `read_bytes`."""
        return os.fdopen(_patiently(lambda: self._descriptor(name, limit)), "rb")

    @contextmanager
    def replaced_durably(self, name: str) -> Iterator[BinaryIO]:
        """A file to write, which replaces `name` atomically and durably when the block ends without an error.

        It is made under another name in the same folder, which must exist, so no existing file is ever changed.
        """
        with self._made(name, durable=True) as made:
            yield made.file
            made.replace()

    def put_durably(self, name: str, data: Any) -> None:
        """Replace the content of a file atomically and durably."""
        self.put(name, data)

    def put(self, name: str, data: Any, *, only_new: bool = False, durable: bool = True) -> bool:
        """Write a whole file in an existing folder; it appears in full or not at all.

        Args:
            only_new: keep an existing file and return False.
            durable: whether the file must survive a power cut; without that, a disk is ten times as fast.
        """

        def write() -> bool:
            with self._made(name, durable) as made:
                made.file.write(data)
                if only_new:
                    return made.link()
                made.replace()
                return True

        return _patiently(write)

    def make_folder(self, name: str = "") -> None:
        """Make this folder, or one inside, with all folders on the way, unless it exists."""
        chain = self._chain(name)

        def make() -> None:
            try:
                self._root.mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self._root)) from error
            for depth in range(len(chain)):
                with self._opened(chain[:depth]) as folder:
                    folder.make(chain[depth])
            with self._opened(chain):
                return

        _patiently(make)

    def rename(self, name: str, new: str) -> None:
        """Rename a file or folder inside; a file replaces a file of the new name."""

        def rename() -> None:
            *folders, last = (*self._inside, *_parts(name))
            *new_folders, new_last = (*self._inside, *_parts(new))
            with self._opened(folders) as source, self._opened(new_folders) as target:
                source.rename(last, new_last, target)

        _patiently(rename)

    def remove(self, name: str) -> None:
        """Remove a file, or a link itself; does nothing if there is none. Raises IsADirectoryError for a folder."""

        def remove() -> None:
            *folders, last = (*self._inside, *_parts(name))
            with suppress(FileNotFoundError), self._opened(folders) as folder:
                folder.unlink(last)

        _patiently(remove)

    def remove_tree(self, name: str) -> None:
        """Remove a file, a link itself, or a folder with all that is in it; does nothing if there is none.

        Raises:
            FormatError: folders are nested more deeply than ours are.
        """

        def remove() -> None:
            *folders, last = (*self._inside, *_parts(name))
            with suppress(FileNotFoundError), self._opened(folders) as folder:
                _remove_all(folder, last, 0)

        _patiently(remove)

    def remove_empty(self, name: str = "") -> bool:
        """Remove a folder if it is empty. Returns whether it is gone."""
        chain = self._chain(name)
        try:
            if not chain:
                os.rmdir(self._root)
            else:
                with self._opened(chain[:-1]) as folder:
                    folder.remove_folder(chain[-1])
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def remove_partials(self, name: str = "", *, age_s: float = LEFTOVER_AGE_S) -> None:
        """Remove the unfinished files of killed processes from one folder: only names that we make, and only files.

        Args:
            age_s: keep younger ones: they may belong to a process that is still writing.
        """
        with suppress(FileNotFoundError, NotADirectoryError):
            for entry in self.entries(name):
                if entry.is_file and is_partial(entry.name):
                    file = f"{name}/{entry.name}" if name else entry.name
                    if self.age_s(file) >= age_s:
                        self.remove(file)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold an advisory lock on a file, which is created if need be and never changed.

        The system releases the lock when the process ends in any way. Where there are no locks (Windows, some network
        shares) it is not held.

        Raises:
            BlockingIOError: another process holds it.
        """
        try:
            import fcntl
        except ImportError:  # not on Windows
            yield
            return
        *folders, last = (*self._inside, *_parts(name))

        def open_lock() -> int:
            with self._opened(folders) as folder:
                return folder.open(last, os.O_RDWR | os.O_CREAT)

        descriptor = _patiently(open_lock)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
                    raise BlockingIOError(
                        errno.EWOULDBLOCK, "locked by another process", str(self.path / name)
                    ) from error
                # else: a file system without locks
            yield
        finally:
            os.close(descriptor)

    def sync(self, name: str = "") -> None:
        """Flush the names in a folder to the disk; do nothing where the file system cannot."""

        def sync() -> None:
            with self._opened(self._chain(name)) as folder:
                folder.sync()

        _patiently(sync)

    def _chain(self, name: str) -> list[str]:
        """The folders from the root to this one."""
        return [*self._inside, *_parts(name)]

    def _descriptor(self, name: str, limit: int | None) -> int:
        """Open a file to read it, and check its size."""
        *folders, last = (*self._inside, *_parts(name))
        with self._opened(folders) as folder:
            descriptor = folder.open(last, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            if limit is not None and size > limit:
                raise too_large(self.path / name, limit, size)
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise

    @contextmanager
    def _opened(self, folders: list[str]) -> Iterator[OpenFolder]:
        """Open the folder at the end of a chain of folders from the root."""
        folder = open_root(self._root)
        try:
            for name in folders:
                parent, folder = folder, folder.enter(name)
                parent.close()
            yield folder
        finally:
            folder.close()

    @contextmanager
    def _made(self, name: str, durable: bool) -> Iterator[NewFile]:
        """A new file under another name in the folder of `name`; removed at the end if it still has that name."""
        *folders, last = (*self._inside, *_parts(name))
        with self._opened(folders) as folder:
            folder.require_file_or_nothing(last)
            try:
                descriptor, temporary = folder.create(last)
                try:
                    with os.fdopen(descriptor, "wb") as file:
                        yield NewFile(folder, file, temporary, last, durable)
                finally:
                    with suppress(OSError):
                        folder.unlink(temporary)
            except OSError as error:
                if error.filename is None or is_partial(str(error.filename)):  # a full disk names no file at all
                    error.filename = str(folder.path / last)
                raise


def find_leftovers(home: Path, prefix: str = ".", *, age_s: float = LEFTOVER_AGE_S) -> list[Path]:
    """Find half-built and half-removed caches, by default an hour old, that killed commands left in a folder of caches.

    Args:
        prefix: of their names.
        age_s: leave out younger ones: they may belong to a process that is still writing.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        folder = SafeFolder(home)
        return [
            home / entry.name
            for entry in folder.entries()
            if entry.name.startswith(prefix)
            and is_partial(entry.name)
            and (entry.is_file or entry.is_folder)
            and folder.age_s(entry.name) >= age_s
        ]
    return []


def remove_leftovers(cache: Path) -> None:
    """Remove unfinished files and copies of a cache that killed processes left, if they are an hour old.

    Younger ones may belong to another builder that is still writing. Only names that we make are removed.
    """
    folder = SafeFolder(cache)
    with suppress(FileNotFoundError):
        for name in ("", *(entry.name for entry in folder.entries() if entry.is_folder)):
            folder.remove_partials(name)
    for copy in find_leftovers(cache.parent, f".{cache.name}."):
        remove_leftover(copy)


def remove_leftover(path: Path) -> None:
    """Remove a file, a link itself, or a whole folder; links in it are removed and not followed."""
    SafeFolder(path.parent).remove_tree(path.name)


def _remove_all(folder: OpenFolder, name: str, depth: int) -> None:
    if not stat.S_ISDIR(folder.status(name).st_mode):
        folder.unlink(name)
        return
    if depth == _MAX_DEPTH:
        raise FormatError(
            "folders are nested more deeply than those of a cache or a run",
            where=folder.path / name,
            expected=f"at most {_MAX_DEPTH} levels",
            next_step="remove the folder yourself",
        )
    inside = folder.enter(name)
    try:
        with inside.readable() as descriptor:
            names = os.listdir(descriptor)
        for each in names:
            with suppress(FileNotFoundError):  # another process removes it too
                _remove_all(inside, each, depth + 1)
    finally:
        inside.close()
    folder.remove_folder(name)


def _patiently(attempt: Callable[[], Answer]) -> Answer:
    """Try again after a stale handle of a network share, and while threads of this process have too many files open."""
    start, stale = time.monotonic(), 0
    while True:
        try:
            return attempt()
        except OSError as error:
            if error.errno == errno.ESTALE and stale < _STALE_ATTEMPTS:
                stale += 1
            elif error.errno not in _NOT_ENOUGH_FILES or time.monotonic() - start > PATIENCE_S:
                raise
        time.sleep(random.uniform(0.005, 0.05))  # random: threads must not try again at once


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a relative name; "" is the folder itself."""
    parts = tuple(name.split("/")) if name else ()
    if any(part in {"", ".", ".."} or "\0" in part or (os.name == "nt" and set(part) & set("\\:")) for part in parts):
        raise FormatError("not a name inside this folder", found=repr(name)[:200])
    return parts
