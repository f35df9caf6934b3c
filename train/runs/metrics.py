"""What is recorded while a run goes on: a row per epoch in `metrics.parquet`, and whatever trackers follow it."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from pydantic import NonNegativeInt, TypeAdapter

from cache_tools.config import Frozen
from cache_tools.console import warn
from cache_tools.errors import DataError
from cache_tools.files import put_durably
from train.recipe import TrainRecipe
from train.runs.folder import METRICS, TRACKERS
from train.runs.trackers import LOGGERS, Row, State, chosen

if TYPE_CHECKING:
    from train.runs.result import RunResult


def read_metrics(folder: Path) -> pl.DataFrame | None:
    """A row per finished epoch of the run in a folder; None where nothing is recorded.

    Raises:
        DataError: a damaged file.
    """
    path = folder / METRICS
    if not path.is_file():
        return None
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(
            "damaged metrics",
            where=path,
            found=str(error).partition("\n")[0],
            next_step="restore the file, or remove it and go without these curves",
        ) from error


def epochs_logged(folder: Path) -> int:
    """How many epochs are recorded; none where the file is damaged: a run that goes on writes it again in full."""
    try:
        metrics = read_metrics(folder)
    except DataError:
        return 0
    return 0 if metrics is None else len(metrics)


class RunLog:
    """Writes rows of metrics into a run folder and passes them on to trackers.

    A tracker that fails is left out from then on, with one warning. `trackers.json` says how each is found again, and
    how many epochs it has been told if it does not follow any more: a resumed run tells it the others.

    Args:
        history: the epochs that are finished already.
    """

    def __init__(self, folder: Path, recipe: TrainRecipe, history: Sequence[Row]) -> None:
        names = chosen(recipe)
        self._folder, self._loggers = folder, {name: LOGGERS[name]() for name in names}
        self._saved = _read(folder / TRACKERS)
        told = epochs_logged(folder)
        self._known = {
            name: entry if entry["epochs"] is not None else {**entry, "epochs": told}
            for name, entry in self._saved.items()
        }
        for name in names:
            self._start(name, recipe, history)
        self._save()
        if told < len(history):  # killed after the state of an epoch, before its row
            self._store(history)

    def write(self, history: Sequence[Row]) -> None:
        """Record all finished epochs; the last row is new."""
        for name in list(self._loggers):
            self._tell(name, history, len(history) - 1)
        self._store(history)  # last: what stands here has been told

    def _store(self, history: Sequence[Row]) -> None:
        table = pl.DataFrame(list(history), infer_schema_length=None)
        buffer = io.BytesIO()
        table.write_parquet(buffer)
        put_durably(self._folder / METRICS, buffer.getbuffer())

    def finish(self, result: RunResult) -> RunResult:
        """The end of the run; gives the result back."""
        self._end(result)
        return result

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._end(None)

    def _start(self, name: str, recipe: TrainRecipe, history: Sequence[Row]) -> None:
        entry = self._known.get(name, {"run": None, "epochs": 0})
        run = self._try(name, "start", recipe, self._folder, entry["run"])
        if name not in self._loggers:
            return
        self._known[name] = {"run": run, "epochs": entry["epochs"] if run == entry["run"] else 0}
        self._save()
        if self._tell(name, history, self._known[name]["epochs"]):
            self._known[name]["epochs"] = None

    def _tell(self, name: str, history: Sequence[Row], first: int) -> bool:
        for number in range(first, len(history)):
            self._try(name, "epoch", history[number])
            if name not in self._loggers:
                self._known[name]["epochs"] = number
                self._save()
                return False
        return True

    def _end(self, result: RunResult | None) -> None:
        for name in list(self._loggers):
            self._try(name, "finish", result)
        self._loggers.clear()

    def _try(self, name: str, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._loggers[name], method)(*arguments)
        except Exception as error:  # whatever a third party's client raises: a run is worth more than its tracker
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")
            warn(f"{name} stopped logging, the run goes on ({self._folder}): {reason}")
            del self._loggers[name]
            return None

    def _save(self) -> None:
        if self._known != self._saved:
            self._saved = copy.deepcopy(self._known)
            put_durably(self._folder / TRACKERS, json.dumps(self._known, indent=2).encode())


class _Entry(Frozen):
    run: State | None
    epochs: NonNegativeInt | None


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What trackers said about their runs; nothing if that is lost or damaged, and they start anew."""
    try:
        entries = TypeAdapter(dict[str, _Entry]).validate_json(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return {name: entry.model_dump() for name, entry in entries.items()}
