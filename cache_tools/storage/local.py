"""A folder as a place of files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cache_tools.console import storage_error
from cache_tools.errors import StorageError
from cache_tools.files import MAX_FILE_BYTES, PARTIAL, SafeFolder
from cache_tools.storage.base import Entry, Place

_ATTEMPTS = 8
_LEFTOVER_S = 180.0


class LocalPlace(Place):
    """A folder. It may be a link; links inside are not followed."""

    def __init__(self, path: Path) -> None:
        self._folder = SafeFolder(path)

    @property
    def path(self) -> Path:
        return self._folder.path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, key: str, limit: int = MAX_FILE_BYTES) -> bytes:
        with _storage_errors():
            return self._folder.read_bytes(key, limit)

    def put(self, key: str, data: bytes, *, only_new: bool = False, durable: bool = True) -> bool:
        with _storage_errors():
            for _ in range(_ATTEMPTS):
                with suppress(FileNotFoundError):  # no folder yet, or another process has just removed the empty one
                    return self._folder.put(key, data, only_new=only_new, durable=durable)
                with suppress(FileNotFoundError):
                    self._folder.make_folder(key.rpartition("/")[0])
        raise StorageError("another process removes the folder again and again", where=(self.path / key).parent)

    def delete(self, keys: Sequence[str]) -> None:
        with _storage_errors():
            for key in keys:
                self._folder.remove(key)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        with _storage_errors():
            for key in self.keys(prefix):
                if (status := self._folder.regular_status(key)) is not None:  # else removed meanwhile
                    yield Entry(key, status.st_size, status.st_mtime)

    def keys(self, prefix: str = "") -> Iterator[str]:
        with _storage_errors(), suppress(NotADirectoryError):
            yield from (entry.name for entry in self._folder.walk(prefix) if not entry.name.endswith(PARTIAL))

    def has(self, key: str) -> bool:
        with _storage_errors():
            return self._folder.is_file(key)

    def folders(self) -> list[str]:
        with _storage_errors():
            return [entry.name for entry in self._folder.entries() if entry.is_folder and entry.name[:1] != "."]

    def sibling(self, name: str) -> LocalPlace:
        """A place beside this one, which must not be a link."""
        around = self.path.absolute().parent
        return self._at(SafeFolder(around).below(name))

    def child(self, name: str) -> LocalPlace:
        return LocalPlace(self.path / name)

    def tidy(self) -> None:
        with suppress(OSError):
            self._folder.remove_partials(age_s=_LEFTOVER_S)
            self._folder.remove_empty()

    @staticmethod
    def _at(folder: SafeFolder) -> LocalPlace:
        place = LocalPlace(folder.path)
        place._folder = folder
        return place


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        raise storage_error(error) from error
