"""A sweep's table of trials: write it, read it, and combine it with the run folders."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from cache_tools.errors import DataError
from train.report.records import FIGURE_ON, TrialRecord, is_run, known, read_run
from train.weights.run_files import TRIALS, TRIALS_TABLE, has_file, read_parquet_file, run_files, write_file

FIGURES = ("top1", "top5", "nll", "ece", "map", "bce")
# Columns that every table has; the others are settings.
COLUMNS = {
    "trial": pl.String, "student": pl.String, "loss": pl.String, "seed": pl.Int64, "status": pl.String,
    "error": pl.String, "folder": pl.String, "parameters": pl.Int64, "flops": pl.Int64, "latency_1_ms": pl.Float64,
    "latency_128_ms": pl.Float64, "top1": pl.Float64, "map": pl.Float64, "gain": pl.Float64, "top5": pl.Float64,
    "nll": pl.Float64, "ece": pl.Float64, "bce": pl.Float64, "best_epoch": pl.Int64, "best_top1": pl.Float64,
    "best_map": pl.Float64, "epochs_done": pl.Int64, "train_s": pl.Float64,
    "test_split": pl.String, "command": pl.String,
}  # fmt: skip
_MAX_TRIALS = 1_000_000
_REQUIRED = ("student", "loss", "seed", "status", "folder")
_MEASURED_BY_SWEEP = ("flops", "latency_1_ms", "latency_128_ms")
_BEST = ("best_top1", "best_map", "best_epoch")
_RECORD_FIGURES = (*FIGURES, "gain", *_BEST, "parameters", "train_s", *_MEASURED_BY_SWEEP)


def save_table(table: pl.DataFrame, folder: Path) -> None:
    """Write `trials.parquet`, atomically."""
    buffer = io.BytesIO()
    table.write_parquet(buffer)
    write_file(folder / TRIALS_TABLE, buffer.getbuffer())


def setting_columns(table: pl.DataFrame) -> list[str]:
    """Columns that distinguish settings: student, loss and every other setting but the seed."""
    others = [name for name in table.columns if name not in COLUMNS and not name.startswith(FIGURE_ON)]
    return ["student", "loss", *others]


def further_splits(table: pl.DataFrame) -> list[str]:
    """The test splits but the first that a table has figures of, in the columns `figure on SPLIT`."""
    return [name.removeprefix(FIGURE_ON) for name in table.columns if name.startswith(FIGURE_ON)]


def read_tables(paths: Sequence[Path]) -> tuple[list[Path], pl.DataFrame | None]:
    """Sort run folders from folders of sweeps.

    Returns:
        The run folders, and the tables of the sweeps as one. A sweep that has not finished once has no table yet: its
        runs are among the run folders.

    Raises:
        DataError: a damaged table.
    """
    tables = [read_table(path) for path in paths if has_file(path / TRIALS_TABLE)]
    runs: list[Path] = []
    for path in paths:
        if not has_file(path / TRIALS_TABLE):
            trials = [] if is_run(path) else [trial for trial in _trial_folders(path) if is_run(trial)]
            runs += trials or [path]
    return runs, pl.concat(tables, how="diagonal_relaxed") if tables else None


def _trial_folders(sweep: Path) -> list[Path]:
    files = run_files(sweep)
    if not files.exists(TRIALS):
        return []
    return [sweep / TRIALS / entry.name for entry in files.entries(TRIALS) if entry.is_folder]


def read_table(sweep: Path) -> pl.DataFrame:
    """The table in a sweep's folder. Its run folders are those in `sweep`, wherever the sweep was trained.

    Raises:
        DataError: a damaged table, or a table of something else.
    """
    path = sweep / TRIALS_TABLE
    table = read_parquet_file(path, "table of trials", None, None)
    if table is None:
        raise DataError("no table of trials", where=path)
    if missing := [name for name in _REQUIRED if name not in table.columns]:
        raise DataError(
            "not a table of trials",
            where=path,
            expected=f"columns {', '.join(_REQUIRED)}",
            found=f"no {', '.join(missing)}",
        )
    types = {**COLUMNS, **{f"{FIGURE_ON}{split}": pl.Float64 for split in further_splits(table)}}
    try:
        table = table.with_columns(pl.col(name).cast(types[name]) for name in table.columns if name in types)
    except pl.exceptions.PolarsError as error:
        raise DataError("damaged table of trials", where=path, found=str(error).partition("\n")[0]) from error
    problem = _problem(table)
    if problem is not None:
        raise DataError("damaged table of trials", where=path, found=problem)
    folders = [stored and str(sweep / TRIALS / Path(stored).name) for stored in table["folder"]]
    return table.with_columns(pl.Series("folder", folders, dtype=pl.String))


def _problem(table: pl.DataFrame) -> str | None:
    """Why a table cannot be that of a sweep; None if it can."""
    if len(table) > _MAX_TRIALS:
        return f"{len(table):,} trials"
    for name, dtype in table.schema.items():
        if not (dtype.is_integer() or dtype.is_float() or dtype in {pl.String, pl.Boolean, pl.Null}):
            return f"'{name}' of type {dtype}"
    for name in ("student", "loss", "seed", "status"):
        if table[name].null_count():
            return f"no {name} in some rows"
    names = [Path(stored).name for stored in table["folder"] if stored is not None]
    return "a folder without a name" if any(name in {"", ".", ".."} or "\0" in name for name in names) else None


def read_trials(runs: Iterable[Path], table: pl.DataFrame | None = None) -> list[TrialRecord]:
    """The trials in run folders, each with its twin on labels alone, and the trials of a table without a folder.

    The table adds to a run its status, FLOPs, latency and command.

    Raises:
        NotFoundError: a path that is no run folder.
        DataError, RecipeError, WeightsError: a damaged file in one.
    """
    stored = [] if table is None else table.iter_rows(named=True)
    rows = {_key(row, number): row for number, row in enumerate(stored)}
    settings = [] if table is None else setting_columns(table)[2:]  # without student and loss
    folders = {Path(path).resolve(): Path(path) for path in runs}
    folders |= {key: key for key in rows if isinstance(key, Path) and key not in folders and is_run(key)}
    trials: dict[Any, TrialRecord] = {}
    for path in folders.values():
        for trial in read_run(path):
            assert trial.folder is not None, "a run that was read has a folder"
            trials.setdefault(trial.folder.resolve(), trial)
    found = [_completed(trial, rows[key], settings) if key in rows else trial for key, trial in trials.items()]
    return found + [_from_row(row, settings) for key, row in rows.items() if key not in trials]


def _key(row: Mapping[str, Any], number: int) -> Path | int:
    """The run folder, or the number of the row for a trial without one."""
    return Path(row["folder"]).resolve() if row["folder"] else number


def _completed(trial: TrialRecord, row: Mapping[str, Any], settings: Sequence[str]) -> TrialRecord:
    """A run with the columns that only the sweep's table has."""
    return replace(
        trial,
        loss=row["loss"],
        status=row["status"],
        error=row.get("error") or trial.error,
        command=row.get("command") or trial.command,
        figures={**trial.figures, **known({name: row.get(name) for name in _MEASURED_BY_SWEEP})},
        settings={**{name: row[name] for name in settings}, **trial.settings},
    )


def _from_row(row: Mapping[str, Any], settings: Sequence[str]) -> TrialRecord:
    """A trial without a run: it failed before its first epoch, or its folder is gone."""
    further = [name for name in row if name.startswith(FIGURE_ON)]
    return TrialRecord(
        name="",
        student=row["student"],
        loss=row["loss"],
        seed=row["seed"],
        status=row["status"],
        error=row.get("error") or "",
        test_split=row.get("test_split"),
        command=row.get("command") or "",
        figures=known({name: row.get(name) for name in (*_RECORD_FIGURES, *further)}),
        settings={name: row[name] for name in settings},
        folder=Path(row["folder"]) if row["folder"] else None,
    )
