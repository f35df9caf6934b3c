"""A folder as a place of caches."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cache_tools.console import storage_error
from cache_tools.errors import StorageError
from cache_tools.files import MAX_FILE_BYTES, PARTIAL, check_file, put_durably, sync_folder
from cache_tools.places.base import Entry, Place

_ATTEMPTS = 8
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_LEFTOVER_S = 180.0


class LocalPlace(Place):
    """A folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, key: str, limit: int = MAX_FILE_BYTES) -> bytes:
        check_file(self.path / key, limit)
        with _storage_errors():
            return (self.path / key).read_bytes()

    def put(self, key: str, data: bytes, *, only_new: bool = False, durable: bool = True) -> bool:
        file = self.path / key
        with _storage_errors():
            for _ in range(_ATTEMPTS):
                file.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # another process has just removed the empty folder: create it again
                    return _put_new(file, data, durable) if only_new else _put(file, data, durable)
        raise StorageError("another process removes the folder again and again", where=file.parent)

    def delete(self, keys: Sequence[str]) -> None:
        with _storage_errors():
            for key in keys:
                (self.path / key).unlink(missing_ok=True)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        for key in self.keys(prefix):
            try:
                status = (self.path / key).stat()
            except FileNotFoundError:  # removed meanwhile
                continue
            yield Entry(key, status.st_size, status.st_mtime)

    def keys(self, prefix: str = "") -> Iterator[str]:
        for folder, _, names in os.walk(self.path / prefix):
            inside = Path(folder).relative_to(self.path)
            yield from ((inside / name).as_posix() for name in names if not name.endswith(PARTIAL))

    def has(self, key: str) -> bool:
        with _storage_errors():
            return (self.path / key).is_file()

    def folders(self) -> list[str]:
        with _storage_errors(), os.scandir(self.path) as found:
            return sorted(entry.name for entry in found if entry.is_dir() and not entry.name.startswith("."))

    def sibling(self, name: str) -> LocalPlace:
        return LocalPlace(self.path.absolute().with_name(name))

    def child(self, name: str) -> LocalPlace:
        return LocalPlace(self.path / name)

    def tidy(self) -> None:
        with suppress(OSError):  # the folder is not empty, or does not exist
            for file in self.path.glob(f"*{PARTIAL}"):  # left by a killed process
                if time.time() - file.stat().st_mtime > _LEFTOVER_S:
                    file.unlink()
            self.path.rmdir()


def _put(file: Path, data: bytes, durable: bool) -> bool:
    if durable:
        put_durably(file, data)
    else:
        temporary = _partial(file)
        temporary.write_bytes(data)
        temporary.replace(file)
    return True


def _put_new(file: Path, data: bytes, durable: bool) -> bool:
    """Write the file under another name, then link it: the link appears whole or, if the name exists, not at all."""
    temporary = _partial(file)
    try:
        _put(temporary, data, durable)
        os.link(temporary, file)
        if durable:
            sync_folder(file.parent)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_new(file, data)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _partial(file: Path) -> Path:
    return file.with_name(f"{file.name}.{os.getpid()}.{os.urandom(8).hex()}{PARTIAL}")


def _create_new(file: Path, data: bytes) -> bool:
    """For file systems without hard links (exFAT, some network shares): the file exists empty for a moment."""
    try:
        with file.open("xb") as stream:
            stream.write(data)
    except FileExistsError:
        return False
    return True


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        raise storage_error(error) from error
