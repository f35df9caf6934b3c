"""Experiment trackers that follow a run: TensorBoard, MLflow and Weights & Biases behind one small interface.

Trackers only receive data. The same data are in the run's own files, and errors of a tracker do not affect training.

The record of a tracker's run may have been received with the run folder. It never decides which server is contacted:
that is the configured one, and a run is resumed there only if the record is about the same server.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from cache_tools.console import unescaped_output, warn
from cache_tools.errors import RecipeError, printable
from train.evaluate.multilabel import MultiLabelEvaluation, headline_of
from train.recipe import TrainRecipe
from train.runs.folder import BOARD, flatten
from train.weights.run_files import real_folder

if TYPE_CHECKING:
    from train.runs.result import RunResult

Row = Mapping[str, float | int | None]
State = dict[str, str]

PROJECT = "teacher-cache"
_MODULES = {"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
_MLFLOW_BATCH = 100  # parameters per request
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


class Tracker(Protocol):
    """The interface of a tracker. Any method may raise; the run then goes on without this tracker."""

    def start(self, recipe: TrainRecipe, folder: Path, stored: State | None) -> State:
        """Start or resume the tracker's own run.

        Args:
            folder: of our run.
            stored: the return value of an earlier start, to resume its run; None for a new run.

        Returns:
            How to find the tracker's run again. It equals `stored` if and only if that run is resumed.
        """

    def epoch(self, row: Row) -> None:
        """Receive a finished epoch; figures that were not measured are None."""

    def finish(self, result: RunResult | None) -> None:
        """End the run, with its result, or None for a run that was stopped and may be resumed."""


class TensorBoardTracker:
    """Writes events into `tb` in the run folder."""

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, recipe: TrainRecipe, folder: Path, stored: State | None) -> State:
        self._folder = real_folder(folder, BOARD).path  # TensorBoard itself would follow a link
        return stored or {"folder": BOARD}

    def epoch(self, row: Row) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:  # purges what an earlier process wrote for this epoch and later ones
            self._writer = SummaryWriter(str(self._folder), purge_step=row["epoch"])
        for name, value in _figures(row):
            self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def finish(self, result: RunResult | None) -> None:
        if self._writer is not None:
            self._writer.close()


class MLflowTracker:
    """Logs to MLflow's configured server: `MLFLOW_TRACKING_URI`, or `mlflow.db` in the working folder."""

    def start(self, recipe: TrainRecipe, folder: Path, stored: State | None) -> State:
        import mlflow

        uri = mlflow.get_tracking_uri()
        self._client, server = mlflow.MlflowClient(tracking_uri=uri), without_password(uri)
        known = stored is not None and _is_here("mlflow", stored.get("tracking_uri", ""), server, stored.get("run_id"))
        if stored is not None and known and self._reopened(stored["run_id"]):
            self._run_id = stored["run_id"]
            return stored
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        tags = {"folder": str(folder.absolute()), "student": recipe.student, "loss": recipe.loss_name}
        self._run_id = self._client.create_run(experiment, run_name=_title(recipe), tags=tags).info.run_id
        settings = flatten(recipe.model_dump(mode="json"))
        params = [mlflow.entities.Param(key, str(value)) for key, value in settings.items()]
        for start in range(0, len(params), _MLFLOW_BATCH):
            self._client.log_batch(self._run_id, params=params[start : start + _MLFLOW_BATCH])
        return {"tracking_uri": server, "run_id": self._run_id}

    def epoch(self, row: Row) -> None:
        step = row["epoch"]
        assert isinstance(step, int), "epochs are counted"
        self._log(dict(_figures(row)), step)

    def finish(self, result: RunResult | None) -> None:
        if result is not None:
            self._log(_final(result), result.epochs - 1)
        self._client.set_terminated(self._run_id, "KILLED" if result is None else "FINISHED")

    def _log(self, figures: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(1000 * time.time())
        self._client.log_batch(self._run_id, [Metric(name, value, now_ms, step) for name, value in figures.items()])

    def _reopened(self, run_id: str) -> bool:
        """Set an existing run to running again; False if it does not exist any more."""
        from mlflow.exceptions import MlflowException

        try:
            if self._client.get_run(run_id).info.lifecycle_stage != "active":
                return False
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name)
            except MlflowException:  # another process has just created it
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id


class WandbTracker:
    """Logs to Weights & Biases, offline without a login: `wandb sync` uploads the run later."""

    def start(self, recipe: TrainRecipe, folder: Path, stored: State | None) -> State:
        import wandb

        settings, project = wandb.Settings(console="off"), os.environ.get("WANDB_PROJECT", PROJECT)
        server = f"{without_password(wandb.setup().settings.base_url)}/{project}"
        if stored is not None and not _is_here("wandb", stored.get("server", server), server, stored.get("id")):
            stored = None
        with unescaped_output():
            offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False)
            self._run = wandb.init(
                project=project,
                id=None if stored is None else stored["id"],
                resume=None if stored is None else "allow",
                name=_title(recipe),
                config={**recipe.model_dump(mode="json"), "folder": str(folder.absolute())},
                mode="offline" if offline else None,
                reinit="create_new",  # each student that trains beside others has its own run
                settings=settings,
            )
        return stored or {"id": self._run.id, "server": server}

    def epoch(self, row: Row) -> None:
        step = row["epoch"]
        assert isinstance(step, int), "epochs are counted"
        self._run.log({"epoch": step, **dict(_figures(row))}, step=step)

    def finish(self, result: RunResult | None) -> None:
        if result is not None:
            self._run.summary.update(_final(result))
        with unescaped_output():
            self._run.finish(exit_code=0 if result is not None else 1)


TRACKER_CLASSES: dict[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "mlflow": MLflowTracker,
    "wandb": WandbTracker,
}


def choose_trackers(recipe: TrainRecipe) -> tuple[str, ...]:
    """The names of a recipe's trackers, each once. If the recipe names none, TensorBoard if it is installed.

    Raises:
        RecipeError: a tracker whose package cannot be imported.
    """
    if recipe.loggers is None:
        return ("tensorboard",) if _import_error("tensorboard") is None else ()
    for name in recipe.loggers:
        if (problem := _import_error(name)) is not None:
            raise RecipeError(
                f"logging to '{name}' needs a package that cannot be imported",
                where="--log",
                found=problem,
                next_step=f"install it: pip install 'teacher-cache[{name}]', or leave it out",
            )
    return tuple(dict.fromkeys(recipe.loggers))


def _import_error(name: str) -> str | None:
    """Why the package of a tracker cannot be imported; None if it can."""
    try:
        importlib.import_module(_MODULES[name])
    except Exception as error:  # a broken package may raise anything
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def without_password(uri: str) -> str:
    """A URI as it may be stored in a run folder, which people share: without user name, password and query."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return ""
    if not parts.netloc:  # a path or a database file
        return uri
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _is_here(name: str, stored: str, configured: str, run_id: str | None) -> bool:
    """Whether the record of a tracker's run is about the configured server; prints a warning if it is not."""
    if run_id is None or not _ID.fullmatch(run_id):
        return False
    if without_password(stored) == configured:
        return True
    warn(f"{name} starts a new run on {configured}: the run folder names another server, {without_password(stored)}")
    return False


def _title(recipe: TrainRecipe) -> str:
    return printable(f"{recipe.name} {recipe.student} {recipe.loss_name} seed {recipe.seed}")


def _figures(row: Row) -> Iterator[tuple[str, float]]:
    """The figures that were measured."""
    return ((name, value) for name, value in row.items() if name != "epoch" and value is not None)


def _final(result: RunResult) -> dict[str, float]:
    """The figures that are known only at the end of a run."""
    figures: dict[str, float] = {"parameters": result.parameters, "total_train_s": result.train_s}
    if result.best is not None and result.best_epoch is not None:
        name = f"best_test_{headline_of(isinstance(result.best, MultiLabelEvaluation))}"
        figures |= {name: result.best.headline, "best_epoch": result.best_epoch}
    return figures
