"""What is asked of a place of caches, whether it is a folder or a prefix of an object store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cache_tools.files import MAX_FILE_BYTES


@dataclass(frozen=True)
class Entry:
    """One file of a place: its key, its size in bytes, and when it was written by the place's own clock (s)."""

    key: str
    size: int
    modified_s: float


class Place(ABC):
    """A folder or a prefix of an object store. `str(place)` is what a user would type."""

    @abstractmethod
    def __str__(self) -> str: ...

    @property
    def name(self) -> str:
        """The last part of its path."""
        return str(self).rstrip("/").rpartition("/")[2]

    @abstractmethod
    def read(self, key: str, limit: int = MAX_FILE_BYTES) -> bytes:
        """A whole file.

        Args:
            limit: the most bytes that it can have.

        Raises:
            FileNotFoundError: not there.
            FormatError: a file that is larger, or no file; nothing of it is read.
            StorageError: unreadable storage.
        """

    @abstractmethod
    def put(self, key: str, data: bytes, *, only_new: bool = False, durable: bool = True) -> bool:
        """Write a whole file, replacing what is there; with `only_new` leave that alone and give False.

        What is put with `only_new` must be unlike what others put there: an object store whose answer got lost is asked
        again, and then tells its own file by the contents.

        Args:
            durable: whether it must outlive a power cut; without that a disk is ten times as fast.

        Raises:
            StorageError: full, read-only or unreachable storage.
        """

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Remove files; those that are not there are no error."""

    @abstractmethod
    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """All files below `prefix` (a folder, or nothing for all), unordered; no leftovers of interrupted writes."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Names of what is directly in it and holds files, sorted; hidden ones left out."""

    @abstractmethod
    def has(self, key: str) -> bool:
        """Whether a file is there.

        Raises:
            StorageError: unreachable storage.
        """

    def keys(self, prefix: str = "") -> Iterator[str]:
        """The keys of `entries`; a folder gives them faster, as it need not look at each file."""
        return (entry.key for entry in self.entries(prefix))

    @abstractmethod
    def sibling(self, name: str) -> Place:
        """A place beside this one."""

    @abstractmethod
    def tidy(self) -> None:
        """Leave nothing where no file is: no empty folder, no leftovers of interrupted writes."""

    @abstractmethod
    def child(self, name: str) -> Place:
        """A place inside this one."""
