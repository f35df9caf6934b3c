"""A zarr store on a local disk whose writes survive a crash and a power cut."""

from __future__ import annotations

import asyncio

from zarr.core.buffer import Buffer

from cache_tools.durable import put_durably
from cache_tools.read_store import ReadStore


class DurableStore(ReadStore):
    """A ReadStore whose `set` returns when the bytes and the name are on the disk.

    zarr's own store replaces files atomically but leaves flushing to the operating system; a commit must never reach
    the disk before the rows it vouches for, not even when the power fails.
    """

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        await asyncio.to_thread(put_durably, self.root / key, value.as_buffer_like())

    def set_sync(self, key: str, value: Buffer) -> None:
        self._check_writable()
        put_durably(self.root / key, value.as_buffer_like())
