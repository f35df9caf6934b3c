"""The base of every codec: a frozen value that encodes float32 rows into small arrays and decodes them again.

A codec lists the zarr arrays it needs (`arrays`), fills them (`encode`) and reads them (`decode`). torch is imported
only for decoding.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, PositiveInt

from cache_tools.config import Frozen
from cache_tools.errors import FormatError
from cache_tools.lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

Rows: TypeAlias = "npt.NDArray[np.float32]"
Encoded: TypeAlias = "dict[str, npt.NDArray[Any]]"  # suffix → array [B, width of that array]
Stored = Mapping[str, Any]  # the same, as numpy arrays or as tensors
Constants = Mapping[str, Any]  # suffix → float32 array or tensor
NO_CONSTANTS: Constants = MappingProxyType({})

Pack = Literal["zstd", "blosc", "pcodec"]
# Blosc's shuffle separates the bytes of 16-bit codes; nearly all high bytes are zero. Higher levels look for
# repetitions, which codes do not have, and find worse Huffman tables. pcodec models the numbers: 5 to 15 % denser,
# but tensorstore cannot read it. No zarr `transpose` before pcodec: numcodecs 0.16 scrambles arrays that are not in
# C order.
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
_ITEM_BYTES = {"int8": 1, "int16": 2, "int32": 4, "uint8": 1, "float16": 2, "float32": 4}
FILL_VALUES = {"int8": -128, "int16": -32768, "uint8": 255, "float16": float("nan"), "float32": float("nan")}


class StoredArray(Frozen):
    """One zarr array [V, N, width] that a codec needs.

    Attributes:
        suffix: follows the name of the target in the array's name; "" for the array named like the target.
        dtype: a numpy dtype.
        fill_value: stands for missing chunks; never the first number of a row, so that a missing chunk is noticed.
        attributes: zarr attributes that let other readers interpret the numbers (`scale_factor` where one is enough).
        pack: the compression.
    """

    suffix: str = ""
    width: PositiveInt
    dtype: Literal["int8", "int16", "int32", "uint8", "float16", "float32"]
    fill_value: float | int
    attributes: dict[str, float | int | str] = Field(default_factory=dict)
    pack: Pack = "zstd"

    def create_arguments(self) -> dict[str, Any]:
        """Keywords of `zarr.Group.create_array`: dtype, codecs (with crc32c), fill value, attributes.

        Raises:
            FormatError: the array is packed with pcodec, which is not installed.
        """
        self.check_readable()
        if self.pack == "pcodec":
            serializer, compressors = _PACKED["pcodec"], []
        else:
            # zarr writes little-endian by default; other readers reject an endianness for single bytes.
            endian = {} if self._itemsize == 1 else {"configuration": {"endian": "little"}}
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
        """Raise FormatError if the array is packed with pcodec and pcodec is not installed."""
        if self.pack == "pcodec" and importlib.util.find_spec("pcodec") is None:
            raise FormatError(
                "arrays packed with pcodec need a package that is not installed",
                expected="pcodec",
                next_step="pip install 'teacher-cache[codecs]', or choose another pack",
            )

    def is_fill(self, values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Whether each of `values`, the first numbers of rows, marks a missing chunk."""
        matches: npt.NDArray[np.bool_] = (
            np.isnan(values) if isinstance(self.fill_value, float) else values == self.fill_value
        )
        return matches

    @property
    def row_bytes(self) -> int:
        """Bytes of a row before compression, and in the memory of a device."""
        return self.width * self._itemsize

    @property
    def _itemsize(self) -> int:
        return _ITEM_BYTES[self.dtype]


class Codec(Frozen, ABC):
    """How rows [B, width] of one target are stored. The field `codec` is the name of the subclass.

    Some codecs have parameters that come from data (`constant_shapes` is not empty). `fit` computes them once per
    cache; every other call takes them as `constants`.

    Attributes:
        fit_rows: the number of rows that `fit` is given, if there are as many.
    """

    fit_rows: ClassVar[int] = 2048

    @property
    def lossless(self) -> bool:
        """Whether decoding returns float32 rows bit for bit."""
        return False

    def for_width(self, width: int) -> Codec:
        """The codec for rows of `width` numbers: itself, unless decoding needs to know the width."""
        return self

    def caution(self, temperature: float) -> str | None:
        """A one-sentence warning for users at this temperature; None if there is nothing to warn of."""
        return None

    @abstractmethod
    def arrays(self, width: int) -> tuple[StoredArray, ...]:
        """The zarr arrays for a target of `width` numbers per row."""

    def constant_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Suffixes and shapes of the float32 constants, which hold for all rows."""
        return {}

    def fit(self, sample: Rows) -> dict[str, Rows]:
        """Compute the constants from a sample of rows [S, width]."""
        return {}

    def encode(
        self, values: npt.NDArray[Any], constants: Constants = NO_CONSTANTS, *, where: str = "target"
    ) -> Encoded:
        """Encode rows [B, width] into arrays of the dtypes and widths that `arrays` lists.

        Args:
            values: floating-point numbers.
            where: names the rows in error messages.

        Raises:
            FormatError: a number is not finite or is out of range. Codes never wrap around.
        """
        return self._encode(finite_rows(values, where, self._width(constants, where)), constants, where)

    def decode(self, stored: Stored, constants: Constants = NO_CONSTANTS, index: Any = None) -> torch.Tensor:
        """Decode rows [B, width] to float32 on the device of `stored`: the rows at `index`, or all.

        The result never shares memory with `stored`.
        """
        return self._decode(gather(stored, index), constants)

    @abstractmethod
    def error_bound(self, values: npt.NDArray[Any], constants: Constants = NO_CONSTANTS) -> npt.NDArray[np.float64]:
        """The largest error of decoding `values` [B, width], in an array that broadcasts to that shape."""

    @abstractmethod
    def _encode(self, rows: Rows, constants: Constants, where: str) -> Encoded:
        """Encode finite rows."""

    @abstractmethod
    def _decode(self, parts: Mapping[str, torch.Tensor], constants: Constants) -> torch.Tensor:
        """Decode all rows of `parts`, which may share memory with the stored arrays."""

    def _width(self, constants: Constants, where: str) -> int | None:
        """The width that rows must have; None if any will do."""
        return None


def gather(stored: Stored, index: Any = None) -> dict[str, torch.Tensor]:
    """The rows at `index`, or all, of every stored array, as tensors in their own dtypes.

    Args:
        index: a slice, a boolean mask or numbers: a tensor on any device, an array, a list or a range.
    """
    import torch

    tensors = {suffix: torch.as_tensor(array) for suffix, array in stored.items()}
    if index is None:
        return tensors
    if isinstance(index, slice):
        return {suffix: rows[index] for suffix, rows in tensors.items()}
    numbers = index if isinstance(index, torch.Tensor) else torch.as_tensor(np.asarray(index))
    if numbers.dtype == torch.bool:
        return {suffix: rows[numbers.to(rows.device)] for suffix, rows in tensors.items()}
    return {suffix: rows.index_select(0, numbers.to(rows.device).long()) for suffix, rows in tensors.items()}


def new_float32(rows: torch.Tensor) -> torch.Tensor:
    """A float32 copy, even of float32 rows: decoding works in place and must not touch the stored arrays."""
    import torch

    return rows.to(torch.float32, copy=True)


def finite_rows(values: npt.NDArray[Any], where: str, width: int | None = None) -> Rows:
    """Convert rows to float32 and check them.

    Raises:
        FormatError: the array is not a floating-point [B, width], or a number is not finite in float32.
    """
    values = np.asarray(values)
    if values.ndim != 2 or values.dtype.kind != "f" or (width is not None and values.shape[1] != width):
        raise FormatError(
            "wrong rows to encode",
            where=where,
            expected=f"floating [rows, {width if width is not None else 'width'}]",
            found=f"{values.dtype} {list(values.shape)}",
        )
    with np.errstate(over="ignore"):  # infinite numbers are reported below
        rows = np.ascontiguousarray(values, dtype=np.float32)
    expected, next_step = "finite", "check the weights and the precision"
    if values.dtype == np.float16:  # a build converts rows to half precision on the device; overflow is infinite here
        expected, next_step = "finite, within ±65504", f"store float32 (--codec float32), or {next_step}"
    wrong = ~np.isfinite(rows)
    if wrong.any() and (nan := np.isnan(rows)).any():  # not a matter of range, so another codec does not help
        wrong, expected, next_step = nan, "finite", "check the weights"
    reject(wrong, values, where, expected, next_step)
    return rows


def reject(wrong: npt.NDArray[np.bool_], values: npt.NDArray[Any], where: str, expected: str, next_step: str) -> None:
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


def round_to_int16(
    scaled: npt.NDArray[Any], values: npt.NDArray[Any], where: str, limits: str
) -> npt.NDArray[np.int16]:
    """Round to whole numbers within ±32767; −32768 is the fill value.

    Args:
        scaled: the numbers to round, [B, width].
        values, limits: the numbers before scaling and their allowed range, for the error message.
    """
    codes: npt.NDArray[np.floating[Any]] = np.rint(scaled)
    reject(~(np.abs(codes) <= 32767), values, where, limits, "choose a larger step, or store float16")
    return codes.astype(np.int16)
