"""The files of a run or a sweep, of which somebody else may have made the folder.

No link inside it is followed, pipes and devices are refused, and files are bounded before they are read.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_tools.errors import DataError, StorageError
from cache_tools.files import SafeFolder

if TYPE_CHECKING:
    import polars as pl

IDENTITY, LABELS_ONLY = "run.json", "labels-only"
SWEEP, TRIALS_TABLE, TRIALS = "sweep.yaml", "trials.parquet", "trials"  # of a sweep

MAX_TEXT_BYTES = 4 << 20  # of a recipe, a result, an identity
MAX_TABLE_BYTES, MAX_TABLE_ROWS, MAX_TABLE_COLUMNS = 512 << 20, 20_000_000, 2_000
_MAX_DEPTH = 64  # of JSON; ours has less than ten levels


def run_files(run: Path | str) -> SafeFolder:
    """The folder of a run. A trial is entered from the folder of its sweep, a run on labels alone from its run.

    What the user names may be a link; a folder that a run or a sweep has made may not.
    """
    run = Path(run)
    outer = run.parent
    if run.name == LABELS_ONLY and _has(outer, IDENTITY):
        return run_files(outer).below(LABELS_ONLY)
    if outer.name == TRIALS and (_has(outer.parent, SWEEP) or _has(outer.parent, TRIALS_TABLE)):
        return SafeFolder(outer.parent).below(TRIALS).below(run.name)
    return SafeFolder(run)


def file_place(path: Path | str) -> tuple[SafeFolder, str]:
    """The folder of a file in a run, and the name of the file there."""
    return run_files(Path(path).parent), Path(path).name


def has_file(path: Path) -> bool:
    """Whether there is a file of a run. Anything else of that name, such as a link, is refused when it is opened."""
    folder, name = file_place(path)
    return folder.exists(name)


def read_file(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes | None:
    """The content of a file of a run; None if there is none.

    Raises:
        FormatError: a link, pipe or device, or a file that is larger than `limit` bytes.
    """
    folder, name = file_place(path)
    try:
        return folder.read_bytes(name, limit)
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_json(path: Path, limit: int = MAX_TEXT_BYTES) -> Any:
    """The JSON in a file of a run; None if there is no such file.

    Raises:
        ValueError: it is not JSON, or nested more deeply than ours.
        FormatError: as `read_file`.
    """
    data = read_file(path, limit)
    return None if data is None else parse_json(data)


def parse_json(data: bytes | str) -> Any:
    """JSON as plain values of bounded depth. Raises ValueError."""
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError("values are nested too deeply") from error
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError("values are nested too deeply")


def write_file(path: Path, data: Any) -> None:
    """Replace a file of a run, atomically and durably.

    Raises:
        FormatError: there is a link, pipe or device of that name.
        StorageError: the folder is gone, or something else is in the way.
    """
    folder, name = file_place(path)
    try:
        folder.put_durably(name, data)
    except OSError as error:
        raise _cannot_write(error, path) from error


def remove_file(path: Path) -> None:
    """Remove a file of a run, or a link itself."""
    folder, name = file_place(path)
    folder.remove(name)


def real_folder(run: Path, name: str) -> SafeFolder:
    """A folder inside a run, which is made if there is none.

    Raises:
        FormatError: a link, pipe or device.
        StorageError: a file is in the way.
    """
    inside = run_files(run).below(name)
    try:
        inside.make_folder()
    except OSError as error:
        raise _cannot_write(error, inside.path) from error
    return inside


def read_parquet_file(
    path: Path, what: str, columns: Mapping[str, Any] | None, next_step: str | None
) -> pl.DataFrame | None:
    """Read a parquet file of a run; None if there is none.

    Args:
        what: for messages.
        columns: name → type of the columns to read, converted; None reads all.

    Raises:
        DataError: it is damaged, or not such a table.
        FormatError: as `read_file`.
    """
    import polars as pl

    data = read_file(path, MAX_TABLE_BYTES)
    if data is None:
        return None
    try:
        table = _read_parquet(data, None if columns is None else list(columns))
        if columns is not None:
            table = table.select(pl.col(name).cast(dtype) for name, dtype in columns.items())
        return table
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError, MemoryError) as error:
        raise DataError(
            f"damaged {what}",
            where=path,
            expected=None if columns is None else f"a parquet file with {', '.join(columns)}",
            found=str(error).partition("\n")[0] or type(error).__name__,
            next_step=next_step,
        ) from error


def _read_parquet(data: bytes, names: Collection[str] | None) -> pl.DataFrame:
    import polars as pl

    schema = pl.read_parquet_schema(BytesIO(data))
    kept = list(schema) if names is None else [name for name in names if name in schema]
    if names is not None and len(kept) < len(names):
        raise ValueError(f"no {', '.join(sorted(set(names) - set(kept)))}")
    if len(kept) > MAX_TABLE_COLUMNS:
        raise ValueError(f"{len(kept)} columns")
    nested = [name for name in kept if schema[name].is_nested() or schema[name] == pl.Binary]
    if nested:
        raise ValueError(f"{nested[0]} of type {schema[nested[0]]}")
    rows = pl.scan_parquet(BytesIO(data)).select(pl.len()).collect().item()  # from the footer alone
    if rows > MAX_TABLE_ROWS or rows * max(len(kept), 1) > 4 * MAX_TABLE_ROWS:
        raise ValueError(f"{rows} rows")
    return pl.read_parquet(BytesIO(data), columns=kept, n_rows=rows)


def _cannot_write(error: OSError, path: Path) -> OSError | StorageError:
    """The error for a run folder that somebody has removed or replaced while it was in use; others as they are."""
    if error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}:
        return error
    is_gone = error.errno == errno.ENOENT
    return StorageError(
        "the folder was removed while it was in use" if is_gone else "something else is where the file should be",
        where=path,
        found=None if is_gone else error.strerror,
        next_step="run the same command again" if is_gone else "remove it, or choose another --out",
    )


def _has(folder: Path, name: str) -> bool:
    return os.path.lexists(folder / name)
