"""Decode single chunk files of an array, from wherever they come, as the format says and in no more memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.array_layout import ArrayLayout
from cache_tools.errors import FormatError
from cache_tools.files import MAX_METADATA_BYTES
from cache_tools.place import Place


class ChunkFiles:
    """An array at a place.

    Attributes:
        where: the array, for messages.
        max_file_bytes: what the file of a chunk cannot exceed.
    """

    def __init__(self, source: Place, name: str, layout: ArrayLayout) -> None:
        self.where, self.max_file_bytes = f"{source}/{name}", layout.max_file_bytes
        self._name, self._layout = name, layout
        self._metadata = read_file(source, f"{name}/zarr.json", MAX_METADATA_BYTES)

    def decode(self, chunks: dict[str, bytes], selection: Any) -> npt.NDArray[Any]:
        """What is selected of the array, if these files hold it.

        Raises:
            FormatError: damaged chunks, or an array that is stored otherwise than the manifest says.
        """
        import zarr
        from zarr.core.buffer import default_buffer_prototype
        from zarr.storage import MemoryStore

        from cache_tools.bounded import checked
        from cache_tools.store import quiet_numcodecs, translated

        quiet_numcodecs()
        buffer = default_buffer_prototype().buffer
        files = {key: buffer.from_bytes(data) for key, data in chunks.items()}
        files[f"{self._name}/zarr.json"] = buffer.from_bytes(self._metadata)
        with translated(self.where):
            array = zarr.open_array(MemoryStore(files), path=self._name, mode="r", zarr_format=3)
            return np.asarray(checked(array, self._layout, self.where)[selection])


def read_file(source: Place, key: str, limit: int) -> bytes:
    """A file of a cache of at most so many bytes.

    Raises:
        FormatError: missing or larger.
    """
    try:
        return source.read(key, limit)
    except FileNotFoundError as error:
        raise FormatError("missing file", where=f"{source}/{key}", next_step="build the cache again") from error
