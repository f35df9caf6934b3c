"""zarr stores for a local folder: one that checks files before reading them, and one that also flushes its writes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from cache_tools.files import MAX_METADATA_BYTES, check_file, put_durably


class ReadStore(LocalStore):
    """A zarr LocalStore that refuses to read pipes, devices and files larger than a file of the cache can be.

    Args:
        limits: array name → the most bytes that its chunk files can have.
    """

    def __init__(self, root: Path, *, read_only: bool = True, limits: Mapping[str, int] | None = None) -> None:
        super().__init__(root, read_only=read_only)
        self._limits = dict(limits or {})

    def with_read_only(self, read_only: bool = False) -> ReadStore:
        return type(self)(self.root, read_only=read_only, limits=self._limits)

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Buffer | None:
        if not self._is_open:
            await self._open()
        return await asyncio.to_thread(self.get_sync, key, prototype=prototype, byte_range=byte_range)

    def get_sync(self, key: str, *, prototype: Any = None, byte_range: Any = None) -> Buffer | None:
        array, _, name = key.rpartition("/")
        limit = MAX_METADATA_BYTES if name == "zarr.json" else self._limits.get(array)
        check_file(self.root / key, limit)
        return super().get_sync(key, prototype=prototype, byte_range=byte_range)


class DurableStore(ReadStore):
    """A ReadStore whose `set` returns only when the file and its name are on the disk.

    zarr's own store replaces files atomically but leaves flushing to the operating system. A commit must not reach the
    disk before its rows, even if the power fails.
    """

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        await asyncio.to_thread(put_durably, self.root / key, value.as_buffer_like())

    def set_sync(self, key: str, value: Buffer) -> None:
        self._check_writable()
        put_durably(self.root / key, value.as_buffer_like())
