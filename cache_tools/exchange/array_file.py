"""Arrays in `.npz` and parquet files of strangers: nothing is unpickled, and sizes are checked before they are read."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cache_tools.errors import DataError, FormatError
from cache_tools.system.memory import free_memory
from cache_tools.units import human_bytes

NEVER_UNPICKLED = (
    "save plain arrays instead: numbers, and names as text (numpy.array(names, dtype=str)); objects are never unpickled"
)
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name


class ArrayFile:
    """Named arrays of a file. Shapes are known at once; numbers are read when they are asked for.

    Raises:
        DataError: no such file.
        FormatError: neither `.npz` nor parquet, or arrays of objects, which would have to be unpickled.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with opened(path) as file:
            start = file.read(4)
        self._table: dict[str, npt.NDArray[Any]] | None = None
        self._members: dict[str, _Member] = {}
        if start == b"PAR1":
            self._table = _read_parquet(path)
        elif start.startswith(b"PK"):
            self._members = _npz_members(path)
        else:
            raise FormatError(
                "not a file of arrays",
                where=path,
                expected="an .npz of numpy.savez, or a parquet file",
                found="a pickle" if start[:1] == b"\x80" else f"a file that begins with {start!r}",
                next_step=NEVER_UNPICKLED if start[:1] == b"\x80" else None,
            )

    @property
    def names(self) -> list[str]:
        return sorted(self._members if self._table is None else self._table)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._members[name].shape if self._table is None else self._table[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._members[name].dtype if self._table is None else self._table[name].dtype

    def read(self, name: str) -> npt.NDArray[Any]:
        """The array; of an uncompressed `.npz` a map of the file, so that an array may be larger than the memory."""
        return self._members[name].read(self.path) if self._table is None else self._table[name]

    def first(self, names: Sequence[str]) -> str | None:
        """The first of these arrays that the file has."""
        return next((name for name in names if name in self.names), None)


def opened(path: Path) -> BinaryIO:
    """A plain file for reading; raises DataError for anything else, such as a pipe, which might never answer."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError("not a plain file", where=path, next_step="give the path of the file itself")
        return path.open("rb")
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError("cannot read the file", where=path, found=found) from error


class _Member:
    """An array of an `.npz`: its place, shape and dtype."""

    def __init__(self, info: zipfile.ZipInfo, shape: tuple[int, ...], fortran: bool, dtype: np.dtype[Any], head: int):
        self.info, self.shape, self.fortran, self.dtype, self._head = info, shape, fortran, dtype, head

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize if self.shape else self.dtype.itemsize

    def read(self, path: Path) -> npt.NDArray[Any]:
        order: Any = "F" if self.fortran else "C"
        if self.info.compress_type == zipfile.ZIP_STORED and self.nbytes:
            with path.open("rb") as file:
                file.seek(self.info.header_offset)
                header = file.read(_LOCAL_HEADER)
            skipped = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            start = self.info.header_offset + _LOCAL_HEADER + skipped + self._head
            if header[:4] != b"PK\x03\x04" or start + self.nbytes > os.path.getsize(path):
                raise _damaged(path, self.info.filename)
            return np.memmap(path, dtype=self.dtype, mode="r", offset=start, shape=self.shape, order=order)
        import torch

        if self.nbytes > (free := free_memory(torch.device("cpu"))) // 2:
            raise FormatError(
                "a compressed array is too large for the memory",
                where=f"{path}, {self.info.filename}",
                expected=f"at most half of the free {human_bytes(free)}",
                found=human_bytes(self.nbytes),
                next_step="save it with numpy.savez instead of savez_compressed: then it is read piece by piece",
            )
        try:
            with zipfile.ZipFile(path) as archive, archive.open(self.info) as file:
                file.seek(self._head)
                data = file.read(self.nbytes + 1)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            raise _damaged(path, self.info.filename) from error
        if len(data) != self.nbytes:
            raise _damaged(path, self.info.filename)
        return np.frombuffer(data, dtype=self.dtype).reshape(self.shape, order=order)


def _npz_members(path: Path) -> dict[str, _Member]:
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    with archive.open(info) as file:
                        found[info.filename.removesuffix(".npy")] = _read_header(file, info, path)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise FormatError("a damaged .npz file", where=path, found=str(error)) from error
    if not found:
        raise FormatError("a zip file without arrays", where=path, expected="an .npz of numpy.savez")
    return found


def _read_header(file: Any, info: zipfile.ZipInfo, path: Path) -> _Member:
    try:
        version = np.lib.format.read_magic(file)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(file)
    except (ValueError, KeyError, EOFError) as error:
        raise _damaged(path, info.filename) from error
    if dtype.hasobject:
        raise FormatError(
            "an array of Python objects, which only unpickling could read",
            where=f"{path}, {info.filename}",
            expected="numbers, or text",
            next_step=NEVER_UNPICKLED,
        )
    return _Member(info, shape, fortran, dtype, file.tell())


def _read_parquet(path: Path) -> dict[str, npt.NDArray[Any]]:
    import polars as pl

    try:
        table = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise FormatError("cannot read the parquet file", where=path, found=str(error)) from error
    columns: dict[str, npt.NDArray[Any]] = {}
    for column in table.get_columns():
        if column.null_count():
            raise FormatError(
                "a column has empty cells", where=f"{path}, {column.name}", expected="a value in every row"
            )
        if isinstance(column.dtype, pl.List | pl.Array):
            columns[column.name] = _list_column(column, path)
        else:
            columns[column.name] = column.to_numpy()
    return columns


def _list_column(column: Any, path: Path) -> npt.NDArray[Any]:
    """A column of lists of numbers as [rows, width]; raises FormatError for lists of several lengths."""
    import polars as pl

    is_list = isinstance(column.dtype, pl.List)
    widths = column.list.len().unique().to_list() if is_list else [column.dtype.size]
    if len(widths) != 1 or not column.dtype.inner.is_numeric():
        raise FormatError(
            "a column of lists that are not rows of one array",
            where=f"{path}, {column.name}",
            expected="as many numbers in every row as there are classes",
            found=f"{column.dtype}, of {len(widths)} lengths",
        )
    flat = column.explode() if widths[0] else column.head(0)
    if flat.null_count():
        raise FormatError("a list has empty places", where=f"{path}, {column.name}", expected="numbers")
    return flat.to_numpy().reshape(len(column), widths[0])


def _damaged(path: Path, member: str) -> FormatError:
    return FormatError("a damaged array", where=f"{path}, {member}", next_step="save the file again")
