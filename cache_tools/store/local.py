"""zarr stores for a folder that somebody else may have made: one that reads, and one that also flushes its writes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer
from zarr.core.buffer.core import default_buffer_prototype

from cache_tools.files import MAX_FILE_BYTES, MAX_METADATA_BYTES, PARTIAL, SafeFolder

if TYPE_CHECKING:
    from zarr.core.buffer import BufferPrototype


class ReadStore(Store):
    """A zarr store that reads a folder, follows no links in it, and opens nothing but files of a possible size.

    zarr's LocalStore follows links, and would block on a pipe.

    Args:
        limits: array name → the most bytes that its chunk files can have.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, root: Path, *, read_only: bool = True, limits: Mapping[str, int] | None = None) -> None:
        super().__init__(read_only=read_only)
        self.root, self._folder, self._limits = Path(root), SafeFolder(root), dict(limits or {})

    def with_read_only(self, read_only: bool = False) -> ReadStore:
        return type(self)(self.root, read_only=read_only, limits=self._limits)

    async def _open(self) -> None:
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} does not exist")
        await super()._open()

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        await self._ensure_open()
        return await asyncio.to_thread(self.get_sync, key, prototype=prototype, byte_range=byte_range)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        array, _, name = key.rpartition("/")
        limit = MAX_METADATA_BYTES if name == "zarr.json" else self._limits.get(array, MAX_FILE_BYTES)
        try:
            data = self._folder.read_bytes(key, limit)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        return (prototype or default_buffer_prototype()).buffer.from_bytes(_cut(data, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._folder.is_file, key)

    async def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError("this store only reads")

    async def delete(self, key: str) -> None:
        raise NotImplementedError("this store only reads")

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for entry in self._folder.walk(prefix.rstrip("/")):
            if entry.is_file and not entry.name.endswith(PARTIAL):
                yield entry.name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        try:
            names = self._folder.names(prefix.rstrip("/"))
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in names:
            yield name

    def __str__(self) -> str:
        return f"file://{self.root.as_posix()}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.root)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.root == other.root

    __hash__ = None  # type: ignore[assignment]


class DurableStore(ReadStore):
    """A ReadStore whose `set` returns only when the file and its name are on the disk.

    zarr's own store replaces files atomically but leaves flushing to the operating system. A commit must not reach the
    disk before its rows, even if the power fails.
    """

    supports_writes = True

    async def set(self, key: str, value: Buffer) -> None:
        await asyncio.to_thread(self.set_sync, key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        self._check_writable()
        self._folder.put(key, value.as_buffer_like())


def _cut(data: bytes, byte_range: ByteRequest | None) -> bytes:
    if isinstance(byte_range, RangeByteRequest):
        return data[byte_range.start : byte_range.end]
    if isinstance(byte_range, OffsetByteRequest):
        return data[byte_range.offset :]
    if isinstance(byte_range, SuffixByteRequest):
        return data[-byte_range.suffix :] if byte_range.suffix else b""
    return data
