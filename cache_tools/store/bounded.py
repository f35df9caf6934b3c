"""Read arrays from untrusted sources: only what the manifest describes, in no more memory than that needs.

Metadata are compared with the layout before a chunk is read, so only the few codecs of the format ever run. A chunk
whose header claims another size than a chunk's is refused before it is decoded: a kilobyte can claim to be a terabyte.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.codec import Codec
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.codecs.numcodecs import PCodec

from cache_tools.errors import FormatError
from cache_tools.format.layout import ArrayLayout

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def check_array(array: Any, layout: ArrayLayout, where: object) -> zarr.Array[Any]:
    """Check an array against its layout; returns it with codecs that decode nothing larger than a chunk.

    Raises:
        FormatError: a group, or another shape, dtype, chunk shape, fill value or codec. An array with a view axis may
            have more views: growing a cache resizes its arrays before it changes the manifest.
    """
    if not isinstance(array, zarr.Array):
        raise FormatError("wrong array", where=where, expected="a zarr array", found="a group")
    more_views = layout.has_views and array.ndim == len(layout.shape) and array.shape[0] > layout.shape[0]
    shape = (array.shape[0], *layout.shape[1:]) if more_views else layout.shape
    metadata: Any = array.metadata
    found = metadata.to_dict()
    for what, expected, actual in (
        ("wrong array", f"{layout.dtype} {list(shape)}", f"{array.dtype} {list(array.shape)}"),
        ("wrong codecs of an array", layout.codecs, [codec["name"] for codec in found["codecs"]]),
        ("wrong byte order of an array", layout.endian, _endian(found["codecs"][0], layout)),
        ("wrong chunks of an array", list(layout.chunks), list(array.chunks)),
        ("wrong names of chunks", ".", found["chunk_key_encoding"]["configuration"]["separator"]),
        ("wrong fill value of an array", str(layout.fill_value), str(array.fill_value)),
    ):
        if expected != actual:
            raise FormatError(what, where=where, expected=expected, found=actual)
    bounded = replace(metadata, codecs=tuple(_bounded(codec) for codec in metadata.codecs))
    return zarr.Array(zarr.AsyncArray(metadata=bounded, store_path=array.store_path, config=array.config))


class _BoundedZstd(ZstdCodec):
    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        data = chunk_bytes.as_numpy_array()
        return _decode_into(data, _zstd_size(data[:18].tobytes()), chunk_spec, self._zstd_codec.decode)


class _BoundedBlosc(BloscCodec):
    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        data = chunk_bytes.as_numpy_array()
        size = int.from_bytes(data[4:8].tobytes(), "little")
        return _decode_into(data, size, chunk_spec, self._blosc_codec.decode)


class _BoundedPCodec(PCodec):
    async def _decode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
        values = await asyncio.to_thread(self._decode, chunk_data.to_bytes(), chunk_spec)
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(values)

    @staticmethod
    def _decode(data: bytes, chunk_spec: Any) -> npt.NDArray[Any]:
        from pcodec import standalone

        values = np.empty(math.prod(chunk_spec.shape), chunk_spec.dtype.to_native_dtype())
        done = standalone.simple_decompress_into(data, values)
        if done.n_processed != values.size or not done.finished:
            raise ValueError(f"a chunk holds other than {values.size} numbers")
        return values.reshape(chunk_spec.shape)


_BOUNDED: dict[type[Codec], type[Codec]] = {
    ZstdCodec: _BoundedZstd,
    BloscCodec: _BoundedBlosc,
    PCodec: _BoundedPCodec,
}


def _bounded(codec: Codec) -> Codec:
    """The same codec, as the subclass that refuses chunks of the wrong size."""
    kind = _BOUNDED.get(type(codec))
    if kind is None:
        return codec
    bounded = object.__new__(kind)
    bounded.__dict__.update(codec.__dict__)
    return bounded


def _decode_into(data: npt.NDArray[Any], size: int | None, chunk_spec: Any, decode: Callable[..., Any]) -> Any:
    """Decode bytes into the memory of one chunk, if `size`, the decoded size in their header, is that of a chunk."""
    expected = math.prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize
    if size != expected:
        raise ValueError(f"a chunk of {expected} bytes would decode to {'any size' if size is None else size}")
    out = np.empty(expected, np.uint8)
    decode(data, out)
    return chunk_spec.prototype.buffer.from_array_like(out)


def _zstd_size(head: bytes) -> int | None:
    """The decoded size in the header of a zstd frame (RFC 8878, 3.1.1.1); None if it has none."""
    if head[:4] != _ZSTD_MAGIC or len(head) < 6:
        raise ValueError("not a zstd frame")
    descriptor = head[4]
    single_segment = descriptor >> 5 & 1
    length = (single_segment, 2, 4, 8)[descriptor >> 6]
    start = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
    if not length:
        return None
    return int.from_bytes(head[start : start + length], "little") + (256 if length == 2 else 0)


def _endian(serializer: Any, layout: ArrayLayout) -> str | None:
    return None if layout.endian is None else serializer.get("configuration", {}).get("endian")
