"""Files of runs: links inside are not followed, pipes are refused, sizes are bounded, tables have plain columns."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cache_tools.errors import DataError, FormatError, StorageError, UnsafeFileError
from train.weights.run_files import (
    MAX_TABLE_ROWS,
    parse_json,
    read_file,
    read_json,
    read_parquet_file,
    real_folder,
    run_files,
    write_file,
)


def test_a_file_is_replaced_and_read(tmp_path: Path) -> None:
    assert read_file(tmp_path / "result.json") is None
    write_file(tmp_path / "result.json", b"[1]")
    write_file(tmp_path / "result.json", b"[2]")
    assert read_json(tmp_path / "result.json") == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    with pytest.raises(FormatError, match="larger"):
        read_file(tmp_path / "result.json", limit=2)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_but_files_is_read_or_replaced(tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "secret"
    outside.write_text("secret")
    run = tmp_path / "run"
    run.mkdir()
    if kind == "link":
        (run / "result.json").symlink_to(outside)
    else:
        os.mkfifo(run / "result.json")
    with pytest.raises(UnsafeFileError, match=r"result\.json"):
        read_file(run / "result.json")
    with pytest.raises(UnsafeFileError, match=r"result\.json"):
        write_file(run / "result.json", b"ours")
    assert outside.read_text() == "secret"


def test_the_folder_of_a_run_may_be_a_link_but_not_a_folder_inside_a_run_or_a_sweep(tmp_path: Path) -> None:
    """What the user names may be a link; what a run or sweep has made may not."""
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to("real")
    write_file(tmp_path / "run" / "run.json", b"{}")
    assert (tmp_path / "real" / "run.json").read_bytes() == b"{}"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "real" / "labels-only").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError, match="labels-only"):
        write_file(tmp_path / "run" / "labels-only" / "run.json", b"{}")
    with pytest.raises(UnsafeFileError, match="labels-only"):
        real_folder(tmp_path / "run", "labels-only")
    (tmp_path / "trials").symlink_to("elsewhere")  # of a user who keeps runs on another disk
    write_file(tmp_path / "trials" / "mine.json", b"{}")
    write_file(tmp_path / "sweep.yaml", b"")
    with pytest.raises(UnsafeFileError, match="trials"):
        run_files(tmp_path / "trials" / "resnet8").names()


def test_a_folder_that_is_gone_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="removed while it was in use"):
        write_file(tmp_path / "gone" / "state.pt", b"")
    (tmp_path / "state.pt").mkdir()
    with pytest.raises(StorageError, match="something else"):
        write_file(tmp_path / "state.pt", b"")


@pytest.mark.parametrize(
    ("text", "found"),
    [("[" * 100_000, "deeply"), ("[" * 80 + "]" * 80, "deeply"), ("{", "Expecting"), ("1" * 5000, "digits")],
)
def test_json_is_bounded(text: str, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        parse_json(text)


@pytest.mark.parametrize(
    ("column", "found"),
    [
        ([{"a": 1}, {"a": 2}], "Struct"),
        ([[1.0], [2.0]], "List"),
        ([b"x", b"y"], "Binary"),
    ],
)
def test_tables_have_plain_columns(tmp_path: Path, column: list[Any], found: str) -> None:
    pl.DataFrame({"epoch": [0, 1], "loss": column}).write_parquet(tmp_path / "metrics.parquet")
    with pytest.raises(DataError, match=found):
        read_parquet_file(tmp_path / "metrics.parquet", "metrics", None, None)


def test_a_table_of_too_many_rows_is_not_read(tmp_path: Path) -> None:
    """Millions of equal rows are a small file."""
    buffer = io.BytesIO()
    pl.DataFrame({"epoch": pl.repeat(0, MAX_TABLE_ROWS + 1, dtype=pl.Int8, eager=True)}).write_parquet(buffer)
    assert len(buffer.getvalue()) < 1 << 20
    (tmp_path / "metrics.parquet").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="rows"):
        read_parquet_file(tmp_path / "metrics.parquet", "metrics", None, None)


def test_missing_columns_and_other_types_are_errors(tmp_path: Path) -> None:
    pl.DataFrame({"label": ["x"], "predicted": [1]}).write_parquet(tmp_path / "test.parquet")
    with pytest.raises(DataError, match="no confidence"):
        read_parquet_file(tmp_path / "test.parquet", "predictions", {"confidence": pl.Float32}, None)
    with pytest.raises(DataError, match="damaged predictions"):
        read_parquet_file(tmp_path / "test.parquet", "predictions", {"label": pl.UInt32}, None)
