"""The metrics of a run: a row per epoch in `metrics.parquet`, passed on to experiment trackers."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from pydantic import NonNegativeInt, TypeAdapter

from cache_tools.config import Frozen
from cache_tools.console import warn
from cache_tools.errors import DataError
from train.recipe import TrainRecipe
from train.runs.folder import METRICS, TRACKERS
from train.runs.trackers import TRACKER_CLASSES, Row, State, choose_trackers
from train.weights.run_files import read_file, read_parquet_file, write_file

if TYPE_CHECKING:
    from train.runs.result import RunResult


def read_metrics(folder: Path) -> pl.DataFrame | None:
    """Read the metrics of a run, a row per finished epoch; None if there are none.

    Raises:
        DataError: a damaged file.
    """
    next_step = "restore the file, or delete it to do without these curves"
    table = read_parquet_file(folder / METRICS, "metrics", None, next_step)
    if table is None:
        return None
    problem = _problem(table)
    if problem is not None:
        raise DataError("damaged metrics", where=folder / METRICS, found=problem, next_step=next_step)
    # A column without a figure, such as the top-5 of five classes, has no type of its own.
    return table.with_columns(pl.selectors.by_dtype(pl.Null).cast(pl.Float64))


def _problem(table: pl.DataFrame) -> str | None:
    """Why a table is not the metrics of a run: a number or nothing in each field, and the epochs counted from 0."""
    for name, dtype in table.schema.items():
        if not (dtype.is_integer() or dtype.is_float() or dtype == pl.Null):
            return f"'{name}' of type {dtype}"
    if "epoch" not in table.columns or (len(table) and not table.schema["epoch"].is_integer()):
        return "no epochs"
    if table["epoch"].to_list() != list(range(len(table))):
        return "other epochs than 0, 1, 2, …"
    return None


def epochs_logged(folder: Path) -> int:
    """The number of recorded epochs; 0 for a damaged file, which a resumed run rewrites."""
    try:
        metrics = read_metrics(folder)
    except DataError:
        return 0
    return 0 if metrics is None else len(metrics)


class RunLog:
    """Writes the metrics of a run and passes them on to its trackers.

    A tracker that raises is dropped with one warning, and the run goes on. `trackers.json` stores how to find each
    tracker's run again and, for a dropped one, how many epochs it received: a resumed run sends it the others.

    Args:
        history: the epochs that are already finished.
    """

    def __init__(self, folder: Path, recipe: TrainRecipe, history: Sequence[Row]) -> None:
        names = choose_trackers(recipe)
        self._folder, self._trackers = folder, {name: TRACKER_CLASSES[name]() for name in names}
        self._saved = _read(folder / TRACKERS)
        recorded = epochs_logged(folder)
        self._known = {
            name: entry if entry["epochs"] is not None else {**entry, "epochs": recorded}
            for name, entry in self._saved.items()
        }
        for name in names:
            self._start(name, recipe, history)
        self._save()
        if recorded < len(history):  # killed after the state of an epoch was stored, before its row
            self._store(history)

    def write(self, history: Sequence[Row], store: Callable[[Callable[[], None]], None] | None = None) -> None:
        """Record all finished epochs, of which the last is new.

        Args:
            store: calls the function that it is given, at once or later, which writes the file; None for at once.
        """
        for name in list(self._trackers):
            self._send(name, history, len(history) - 1)
        # Last: trackers have received every epoch that is recorded.
        if store is None:
            self._store(history)
        else:
            store(partial(self._store, history))

    def _store(self, history: Sequence[Row]) -> None:
        table = pl.DataFrame(list(history), infer_schema_length=None)
        buffer = io.BytesIO()
        table.write_parquet(buffer)
        write_file(self._folder / METRICS, buffer.getbuffer())

    def finish(self, result: RunResult) -> RunResult:
        """End the run of every tracker, and return the result."""
        self._end(result)
        return result

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._end(None)

    def _start(self, name: str, recipe: TrainRecipe, history: Sequence[Row]) -> None:
        entry = self._known.get(name, {"run": None, "epochs": 0})
        run = self._try(name, "start", recipe, self._folder, entry["run"])
        if name not in self._trackers:
            return
        self._known[name] = {"run": run, "epochs": entry["epochs"] if run == entry["run"] else 0}
        self._save()
        if self._send(name, history, self._known[name]["epochs"]):
            self._known[name]["epochs"] = None

    def _send(self, name: str, history: Sequence[Row], first: int) -> bool:
        for number in range(first, len(history)):
            self._try(name, "epoch", history[number])
            if name not in self._trackers:
                self._known[name]["epochs"] = number
                self._save()
                return False
        return True

    def _end(self, result: RunResult | None) -> None:
        for name in list(self._trackers):
            self._try(name, "finish", result)
        self._trackers.clear()

    def _try(self, name: str, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._trackers[name], method)(*arguments)
        except Exception as error:  # any error of a third party's client: it must not stop the run
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")
            warn(f"{name} stopped logging, the run goes on ({self._folder}): {reason}")
            del self._trackers[name]
            return None

    def _save(self) -> None:
        if self._known != self._saved:
            self._saved = copy.deepcopy(self._known)
            write_file(self._folder / TRACKERS, json.dumps(self._known, indent=2).encode())


class _Entry(Frozen):
    run: State | None
    epochs: NonNegativeInt | None


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The stored states of the trackers; empty if they are lost or damaged, and the trackers start new runs."""
    try:
        entries = TypeAdapter(dict[str, _Entry]).validate_json(read_file(path) or b"{}")
    except ValueError:
        return {}
    return {name: entry.model_dump() for name, entry in entries.items()}
