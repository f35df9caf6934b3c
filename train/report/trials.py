"""A sweep's table of trials, and how it goes together with the folders of their runs."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from cache_tools.errors import DataError
from cache_tools.files import put_durably
from train.report.records import TrialRecord, is_run, known, read_run

_NEEDED = ("student", "loss", "seed", "status", "folder")
_MEASURED = ("flops", "latency_1_ms", "latency_128_ms")
_FIGURES = ("top1", "top5", "nll", "ece", "best_top1", "best_epoch", "parameters", "train_s", *_MEASURED)


def read_tables(paths: Sequence[Path]) -> tuple[list[Path], pl.DataFrame | None]:
    """Sort run folders from folders of sweeps: the former, and the tables of the latter as one.

    A sweep that goes on for the first time has no table yet: the runs that it has begun stand for it.

    Raises:
        DataError: a damaged table.
    """
    tables = [read_table(path) for path in paths if (path / TRIALS).is_file()]
    runs: list[Path] = []
    for path in paths:
        begun = [] if is_run(path) else sorted(trial for trial in path.glob("trials/*") if is_run(trial))
        runs += [] if (path / TRIALS).is_file() else begun or [path]
    return runs, pl.concat(tables, how="diagonal_relaxed") if tables else None


def read_table(sweep: Path) -> pl.DataFrame:
    """The table in a sweep's folder, with its runs' folders as they are found now.

    Raises:
        DataError: a damaged table, or one of something else.
    """
    path = sweep / TRIALS
    try:
        table = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError("damaged table of trials", where=path, found=str(error).partition("\n")[0]) from error
    if missing := [name for name in _NEEDED if name not in table.columns]:
        raise DataError(
            "not a table of trials",
            where=path,
            expected=f"columns {', '.join(_NEEDED)}",
            found=f"no {', '.join(missing)}",
        )

    def located(stored: str | None) -> str | None:
        """Below the sweep, wherever that is now: where the runs were trained, others may be by now."""
        return None if stored is None else str(sweep / "trials" / Path(stored).name)

    return table.with_columns(pl.Series("folder", [located(stored) for stored in table["folder"]], dtype=pl.String))


def read_trials(runs: Iterable[Path], table: pl.DataFrame | None = None) -> list[TrialRecord]:
    """The trials in run folders, each with its twin on labels alone, and those of a table that have no folder.

    What the table says of a run (what became of it, FLOPs, latency, its command) is added to what its folder says.

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
            assert trial.folder is not None, "it was read from one"
            trials.setdefault(trial.folder.resolve(), trial)
    found = [_completed(trial, rows[key], settings) if key in rows else trial for key, trial in trials.items()]
    return found + [_from_row(row, settings) for key, row in rows.items() if key not in trials]


def _key(row: Mapping[str, Any], number: int) -> Path | int:
    """The run's folder, or the row's number for a trial without one."""
    return Path(row["folder"]).resolve() if row["folder"] else number


def _completed(trial: TrialRecord, row: Mapping[str, Any], settings: Sequence[str]) -> TrialRecord:
    """A run with what only the sweep knows about it."""
    return replace(
        trial,
        loss=row["loss"],
        status=row["status"],
        error=row.get("error") or trial.error,
        command=row.get("command") or trial.command,
        figures={**trial.figures, **known({name: row.get(name) for name in _MEASURED})},
        settings={**{name: row[name] for name in settings}, **trial.settings},
    )


def _from_row(row: Mapping[str, Any], settings: Sequence[str]) -> TrialRecord:
    """A trial of which there is no folder: it failed before its first epoch, or the folder is gone."""
    figures = {name: row.get(name) for name in _FIGURES}
    return TrialRecord(
        name="",
        student=row["student"],
        loss=row["loss"],
        seed=row["seed"],
        status=row["status"],
        error=row.get("error") or "",
        command=row.get("command") or "",
        figures=known(figures),
        settings={name: row[name] for name in settings},
        folder=Path(row["folder"]) if row["folder"] else None,
    )


TRIALS = "trials.parquet"


FIGURES = ("top1", "top5", "nll", "ece")


_SCHEMA = {
    "trial": pl.String, "student": pl.String, "loss": pl.String, "seed": pl.Int64, "status": pl.String,
    "error": pl.String, "folder": pl.String, "parameters": pl.Int64, "flops": pl.Int64, "latency_1_ms": pl.Float64,
    "latency_128_ms": pl.Float64, "top1": pl.Float64, "top5": pl.Float64, "nll": pl.Float64, "ece": pl.Float64,
    "best_epoch": pl.Int64, "best_top1": pl.Float64, "epochs_done": pl.Int64, "train_s": pl.Float64,
    "command": pl.String,
}  # fmt: skip


def save_table(table: pl.DataFrame, folder: Path) -> None:
    """Write `trials.parquet`: in full or not at all."""
    buffer = io.BytesIO()
    table.write_parquet(buffer)
    put_durably(folder / TRIALS, buffer.getbuffer())


def setting_columns(table: pl.DataFrame) -> list[str]:
    """Columns that tell trials apart, but for the seed."""
    return ["student", "loss", *(name for name in table.columns if name not in _SCHEMA)]
