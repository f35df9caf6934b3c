"""An open folder, and what is in it: nothing is followed, and only regular files are opened."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cache_tools.errors import UnsafeFileError
from cache_tools.files.whole import PARTIAL, sync_descriptor

_HAS_DESCRIPTORS = {os.open, os.stat, os.unlink, os.rename, os.mkdir, os.rmdir, os.link} <= os.supports_dir_fd
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_FOLDER = getattr(os, "O_DIRECTORY", 0)
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class OpenFolder:
    """An open folder. Where the system has no descriptors of folders, it is a path that is checked before each use."""

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self.path, self._descriptor = path, descriptor

    def close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def enter(self, name: str) -> OpenFolder:
        path = self.path / name
        with _naming(path):
            if self._descriptor is None:
                _require_folder(path, self.status(name))
                return OpenFolder(path, None)
            try:
                return OpenFolder(path, os.open(name, _traverse() | _NO_FOLLOW, dir_fd=self._descriptor))
            except OSError as error:
                if error.errno in {errno.ENOTDIR, errno.ELOOP}:
                    _require_folder(path, self.status(name))
                raise

    @contextmanager
    def readable(self) -> Iterator[int | Path]:
        """What `os.listdir` takes for this folder."""
        if self._descriptor is None:
            yield self.path
            return
        with _naming(self.path):
            descriptor = os.open(".", os.O_RDONLY | _FOLDER, dir_fd=self._descriptor)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def status(self, name: str) -> os.stat_result:
        with _naming(self.path / name):
            return os.stat(self._place(name), dir_fd=self._descriptor, follow_symlinks=False)

    def open(self, name: str, flags: int) -> int:
        """Open a regular file. With O_CREAT it may be new; its content is never touched here."""
        path = self.path / name
        with suppress(FileNotFoundError):
            require_file(path, self.status(name))  # before it is opened: to open a device may have an effect
        with _naming(path):
            try:
                descriptor = os.open(
                    self._place(name), flags | _NO_FOLLOW | _NO_WAIT | _BINARY, 0o666, dir_fd=self._descriptor
                )
            except OSError as error:
                if error.errno in {errno.ELOOP, errno.ENXIO}:  # it has become a link or a pipe since
                    require_file(path, self.status(name))
                raise
        try:
            require_file(path, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def file(self, name: str) -> BinaryIO:
        return os.fdopen(self.open(name, os.O_RDONLY), "rb")

    def create(self, name: str) -> tuple[int, str]:
        """A new file with a name of its own; returns its descriptor and its name."""
        while True:
            temporary = f"{name}.{uuid.uuid4().hex}{PARTIAL}"
            # A network share may repeat a request whose answer was lost, and then say that the file exists.
            with suppress(FileExistsError):
                return self.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), temporary

    def require_file_or_nothing(self, name: str) -> None:
        """Raise unless a file may be put here: something else was not made by us, and is not replaced."""
        with suppress(FileNotFoundError):
            require_file(self.path / name, self.status(name))

    def make(self, name: str) -> None:
        with _naming(self.path / name), suppress(FileExistsError):
            os.mkdir(self._place(name), dir_fd=self._descriptor)

    def rename(self, name: str, new: str, target: OpenFolder | None = None) -> None:
        target = target or self
        with _naming(target.path / new):
            source, destination = self._place(name), target._place(new)
            if self._descriptor is None:
                os.replace(source, destination)
            else:
                os.rename(source, destination, src_dir_fd=self._descriptor, dst_dir_fd=target._descriptor)

    def link(self, name: str, new: str) -> None:
        with _naming(self.path / new):
            if self._descriptor is None:
                os.link(self._place(name), self._place(new))
            else:
                folder = self._descriptor
                os.link(name, new, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)

    def unlink(self, name: str) -> None:
        with _naming(self.path / name):
            os.unlink(self._place(name), dir_fd=self._descriptor)

    def remove_folder(self, name: str) -> None:
        with _naming(self.path / name):
            os.rmdir(self._place(name), dir_fd=self._descriptor)

    def sync(self) -> None:
        if os.name != "nt":
            with self.readable() as folder:
                if isinstance(folder, int):
                    sync_descriptor(folder)

    def _place(self, name: str) -> str | Path:
        return name if self._descriptor is not None else self.path / name


class NewFile(NamedTuple):
    """A new file that gets its name, `target`, when it is finished."""

    folder: OpenFolder
    file: BinaryIO
    name: str
    target: str
    durable: bool

    def replace(self) -> None:
        """Give the file its name; it replaces another file of that name."""
        self._finish()
        self.folder.rename(self.name, self.target)
        if self.durable:
            self.folder.sync()

    def link(self) -> bool:
        """Give the file its name unless that is taken. Returns whether it is ours."""
        self._finish()
        is_ours = self._link()
        if is_ours and self.durable:
            self.folder.sync()
        return is_ours

    def _finish(self) -> None:
        self.file.flush()
        if self.durable:
            os.fsync(self.file.fileno())
        self.file.close()  # Windows renames no open file

    def _link(self) -> bool:
        try:
            self.folder.link(self.name, self.target)
            return True
        except OSError as error:
            # A network share may repeat a request whose answer was lost: then the link was made, and now it exists.
            if self._is_at_target():
                return True
            if isinstance(error, FileExistsError):
                return False
            if error.errno not in _NO_LINKS:
                raise
        return self._create()

    def _is_at_target(self) -> bool:
        try:
            return os.path.samestat(self.folder.status(self.target), self.folder.status(self.name))
        except FileNotFoundError:
            return False

    def _create(self) -> bool:
        """For file systems without hard links (exFAT, some network shares): the file exists empty for a moment."""
        try:
            descriptor = self.folder.open(self.target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file, self.folder.file(self.name) as source:
            file.write(source.read())
        return True


def open_root(path: Path) -> OpenFolder:
    """Open the folder itself, through links: the user named it."""
    _refuse_link_of_stranger(path)
    if not _HAS_DESCRIPTORS:
        with _naming(path):
            if not stat.S_ISDIR(os.stat(path).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return OpenFolder(path, None)
    with _naming(path):
        return OpenFolder(path, os.open(path, _traverse()))


def _traverse() -> int:
    """The flags to open a folder in order to go through it, which needs no permission to list it."""
    return getattr(os, "O_PATH", os.O_RDONLY) | _FOLDER | getattr(os, "O_CLOEXEC", 0)


def _refuse_link_of_stranger(path: Path) -> None:
    """Refuse a link that another user has put into a folder where anybody can write, as Linux does in /tmp."""
    if os.name == "nt":
        return
    with suppress(OSError):
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode) and status.st_uid not in {0, os.geteuid()}:
            around = os.stat(path.parent)
            if around.st_mode & stat.S_IWOTH and around.st_uid != status.st_uid:
                raise UnsafeFileError(
                    "a link of another user, in a folder where anybody can write",
                    where=path,
                    found=_kind(path, status.st_mode),
                    next_step="remove the link, or give the path that it leads to",
                )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give errors of the operating system the full path: the system was given a part of it."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def require_file(path: Path, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise _unsafe("file", path, status.st_mode)


def _require_folder(path: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        return
    if stat.S_ISREG(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    raise _unsafe("folder", path, status.st_mode)


def _unsafe(expected: str, path: Path, mode: int) -> UnsafeFileError:
    is_link = stat.S_ISLNK(mode)
    return UnsafeFileError(
        f"not a {expected}",
        where=path,
        expected=f"a {expected}: links inside a cache or a run are not followed" if is_link else f"a {expected}",
        found=_kind(path, mode),
        next_step=f"remove it, or put the {expected} itself there" if is_link else "remove it",
    )


def _kind(path: Path, mode: int) -> str:
    if stat.S_ISLNK(mode):
        with suppress(OSError):
            return f"a link to {os.readlink(path)}"
        return "a link"
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
