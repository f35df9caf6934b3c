"""The interface of places, whether folders or prefixes of object stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cache_tools.files import MAX_FILE_BYTES


@dataclass(frozen=True)
class Entry:
    """One file of a place: its key, its size in bytes, and when it was written by the clock of the place (s).

    Attributes:
        tag: an object store's word for this content; None for a folder.
    """

    key: str
    size: int
    modified_s: float
    tag: str | None = field(default=None, compare=False)


class Place(ABC):
    """A folder or a prefix of an object store. `str(place)` is its path or URL."""

    @abstractmethod
    def __str__(self) -> str: ...

    @property
    def name(self) -> str:
        """The last part of its path."""
        return str(self).rstrip("/").rpartition("/")[2]

    @abstractmethod
    def read(self, key: str, limit: int = MAX_FILE_BYTES) -> bytes:
        """Read a whole file.

        Args:
            limit: the most bytes that it can have.

        Raises:
            FileNotFoundError: no such file.
            FormatError: a larger file, or something that is no regular file; it is not read.
            StorageError: unreadable storage.
        """

    @abstractmethod
    def put(self, key: str, data: bytes, *, only_new: bool = False, durable: bool = True) -> bool:
        """Write a whole file, replacing an existing one. With `only_new`, keep an existing file and return False.

        With `only_new`, `data` must differ from what other processes put under this key: if the answer of an object
        store is lost and the request repeated, the contents show whose file it is.

        Args:
            durable: whether the file must survive a power cut; without that, a disk is ten times as fast.

        Raises:
            StorageError: full, read-only or unreachable storage.
        """

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Remove files; missing ones are ignored."""

    @abstractmethod
    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """All files, or those below the folder `prefix`; unordered, without leftovers of interrupted writes."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Names of the folders directly inside, sorted, without hidden ones."""

    @abstractmethod
    def has(self, key: str) -> bool:
        """Whether a file exists.

        Raises:
            StorageError: unreachable storage.
        """

    def keys(self, prefix: str = "") -> Iterator[str]:
        """The keys of `entries`. Faster for a folder, which need not look at each file."""
        return (entry.key for entry in self.entries(prefix))

    @abstractmethod
    def sibling(self, name: str) -> Place:
        """A place beside this one."""

    @abstractmethod
    def tidy(self) -> None:
        """Remove leftovers of interrupted writes, and the folder itself if it is empty."""

    @abstractmethod
    def child(self, name: str) -> Place:
        """A place inside this one."""
