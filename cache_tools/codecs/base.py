"""What every codec of target rows is: a frozen value that turns float32 rows into small arrays and back.

A codec says which zarr arrays it needs (`arrays`), makes them (`encode`) and reads them (`decode`). Nothing here needs
torch before something is decoded.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, PositiveInt

from cache_tools.config import Frozen
from cache_tools.errors import FormatError

if TYPE_CHECKING:
    import torch

Rows = npt.NDArray[np.float32]
Stored = Mapping[str, Any]  # suffix → numpy array or tensor [B, width]
Constants = Mapping[str, Rows]
NO_CONSTANTS: Constants = MappingProxyType({})

Pack = Literal["zstd", "blosc", "pcodec"]
# Blosc's shuffle takes the bytes of 16-bit codes apart, the high ones of which are nearly all zero; higher levels look
# for repetitions, which codes do not have, and find worse Huffman tables. pcodec models the numbers: 5 to 15 % denser,
# but tensorstore cannot read it. No zarr `transpose` before pcodec: numcodecs 0.16 scrambles what is not in C order.
_PACKED: dict[Pack, dict[str, Any]] = {
    "zstd": {"name": "zstd", "configuration": {"level": 1, "checksum": False}},
    "blosc": {
        "name": "blosc",
        "configuration": {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 1 << 20},
    },
    "pcodec": {
        "name": "numcodecs.pcodec",
        "configuration": {
            "level": 8,
            "mode_spec": "classic",
            "delta_spec": "try_consecutive",
            "delta_encoding_order": 0,
        },
    },
}
FILL = {"int8": -128, "int16": -32768, "uint8": 255, "float16": float("nan"), "float32": float("nan")}


class StoredArray(Frozen):
    """One zarr array [V, N, width] that a codec needs.

    Attributes:
        suffix: what follows the name of the target; "" for the array that has the target's own name.
        dtype: of numpy.
        fill_value: of chunks that are not there; never the first number of a row, so that a missing chunk shows.
        attributes: what another reader needs to make sense of the numbers (`scale_factor` where that is all).
        pack: how bytes are made small.
    """

    suffix: str = ""
    width: PositiveInt
    dtype: Literal["int8", "int16", "uint8", "float16", "float32"]
    fill_value: float | int
    attributes: dict[str, float | int | str] = Field(default_factory=dict)
    pack: Pack = "zstd"

    def create_arguments(self) -> dict[str, Any]:
        """Keywords of `zarr.Group.create_array`: dtype, codecs (with crc32c), fill value, attributes.

        Raises:
            FormatError: packed with pcodec, which is not installed.
        """
        self.check_readable()
        if self.pack == "pcodec":
            serializer, compressors = _PACKED["pcodec"], []
        else:
            # zarr writes little-endian by itself, and an endianness for single bytes is an error elsewhere.
            endian = {} if np.dtype(self.dtype).itemsize == 1 else {"configuration": {"endian": "little"}}
            serializer = {"name": "bytes", **endian}
            packed = _PACKED[self.pack]
            if self.pack == "blosc":
                packed = packed | {"configuration": packed["configuration"] | {"typesize": self._itemsize}}
            compressors = [packed]
        return {
            "dtype": self.dtype,
            "serializer": serializer,
            "compressors": [*compressors, {"name": "crc32c"}],
            "fill_value": self.fill_value,
            "attributes": dict(self.attributes),
        }

    def check_readable(self) -> None:
        """Raise FormatError if it is packed with pcodec, which is not installed."""
        if self.pack == "pcodec" and importlib.util.find_spec("pcodec") is None:
            raise FormatError(
                "arrays packed with pcodec need a package that is not installed",
                expected="pcodec",
                next_step="pip install 'teacher-cache[codecs]', or choose another pack",
            )

    def is_fill(self, values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which of these numbers, the first ones of rows, mean that a chunk is not there."""
        return np.isnan(values) if isinstance(self.fill_value, float) else values == self.fill_value

    @property
    def row_bytes(self) -> int:
        """Bytes of a row before compression: what it takes on the device."""
        return self.width * self._itemsize

    @property
    def _itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize


class Codec(Frozen, ABC):
    """How rows [B, width] of one target are stored. Subclasses are told apart by their field `codec`.

    A codec whose parameters come from data (`constant_shapes` not empty) is given them as `constants` in every call;
    `fit` makes them, once per cache.
    """

    @property
    def lossless(self) -> bool:
        """Whether decoding gives back float32 rows bit by bit."""
        return False

    def for_width(self, width: int) -> Codec:
        """The codec of rows of `width` numbers: itself, unless reading takes the width."""
        return self

    @abstractmethod
    def arrays(self, width: int) -> tuple[StoredArray, ...]:
        """The zarr arrays for a target of `width` numbers per row."""

    def constant_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Suffixes and shapes of the float32 arrays that hold for all rows."""
        return {}

    def fit(self, sample: Rows) -> dict[str, Rows]:
        """The constants, from a sample of rows [S, width]."""
        return {}

    @abstractmethod
    def encode(
        self, values: npt.NDArray[Any], constants: Constants = NO_CONSTANTS, *, where: str = "target"
    ) -> dict[str, npt.NDArray[Any]]:
        """What is stored of rows [B, width]: suffix → array, in the dtypes and widths of `arrays`.

        Args:
            values: floating numbers.
            where: for messages.

        Raises:
            FormatError: numbers that are not finite or out of range. Nothing ever wraps.
        """

    @abstractmethod
    def decode(
        self, stored: Stored, constants: Constants | Mapping[str, torch.Tensor] = NO_CONSTANTS, index: Any = None
    ) -> torch.Tensor:
        """Rows [B, width] float32, on the device of `stored`: those at `index`, or all. New memory, always."""

    @abstractmethod
    def error_bound(self, values: npt.NDArray[Any], constants: Constants = NO_CONSTANTS) -> npt.NDArray[np.float64]:
        """How far a decoded number can be from `values` [B, width], broadcastable to that shape."""


def checked(values: npt.NDArray[Any], where: str, width: int | None = None) -> Rows:
    """Rows as finite float32.

    Raises:
        FormatError: not a floating [B, width], or a number that is not finite (in float32).
    """
    values = np.asarray(values)
    if values.ndim != 2 or values.dtype.kind != "f" or (width is not None and values.shape[1] != width):
        raise FormatError(
            "wrong rows to encode",
            where=where,
            expected=f"floating [rows, {width if width is not None else 'width'}]",
            found=f"{values.dtype} {list(values.shape)}",
        )
    with np.errstate(over="ignore"):  # found and named below
        rows = np.ascontiguousarray(values, dtype=np.float32)
    expected, next_step = "finite", "check the weights and the precision"
    if values.dtype == np.float16:  # a build halves its rows on the device: what was too large is infinite by now
        expected, next_step = "finite, within ±65504", f"store float32 (--codec float32), or {next_step}"
    refuse(~np.isfinite(rows), values, where, expected, next_step)
    return rows


def refuse(wrong: npt.NDArray[np.bool_], values: npt.NDArray[Any], where: str, expected: str, next_step: str) -> None:
    """Raise FormatError that names the first number for which `wrong` is set, if there is one."""
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise FormatError(
            "a number cannot be stored",
            where=f"{where}, row {row}, column {column}",
            expected=expected,
            found=f"{values[row, column]:g}",
            next_step=next_step,
        )


def to_codes(scaled: npt.NDArray[Any], dtype: str, values: npt.NDArray[Any], where: str, limits: str) -> Any:
    """Round to whole numbers of a signed dtype; its lowest number stays free for `FILL`.

    Args:
        scaled: what to round, [B, width].
        values, limits: the numbers themselves and what they may be, for the message.
    """
    codes = np.rint(scaled)
    largest = np.iinfo(dtype).max
    refuse(~(np.abs(codes) <= largest), values, where, limits, "choose a larger step, or store float16")
    return codes.astype(dtype)


def taken(stored: Stored, suffix: str, index: Any) -> torch.Tensor:
    """Rows of one stored array as a tensor in its own dtype."""
    import torch

    rows = torch.as_tensor(stored[suffix])
    if index is None or isinstance(index, slice):
        return rows if index is None else rows[index]
    index = torch.as_tensor(np.asarray(index) if not isinstance(index, torch.Tensor) else index)
    if index.dtype == torch.bool:
        return rows[index.to(rows.device)]
    return rows.index_select(0, index.to(rows.device).long())


def on(device: torch.device, constant: Any) -> torch.Tensor:
    """A constant as a tensor on a device; a no-op where it is there already."""
    import torch

    return torch.as_tensor(constant).to(device)
