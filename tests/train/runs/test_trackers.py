"""MLflow, Weights & Biases and TensorBoard follow a run without changing it; a broken tracker is dropped."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import polars as pl
import pytest
from typer.testing import CliRunner

import train.run.train
from cache_tools.errors import DataError
from tests.support import tiny_run
from train import checkpoints
from train.checkpoints import BEST, LAST
from train.cli import app
from train.recipe import TrainRecipe
from train.run import train_student
from train.runs import trackers
from train.runs.metrics import RunLog, epochs_logged, read_metrics

pytestmark = pytest.mark.medium

ALL = ("tensorboard", "mlflow", "wandb")
TIMINGS = ["train_s", "images_per_s"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loggers")
    return tiny_run.write_cache(root / "tiny.zarr", tiny_run.write_pictures(root / "pictures", train=24, test=9))


@pytest.fixture(scope="module")
def alone(cache: Path) -> Path:
    """A run without trackers."""
    return train_student(tiny_run.recipe(cache, cache.parent / "alone", loggers=())).folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Local trackers in a folder of the test, without a network."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_tracker_follows_an_interrupted_run(
    monkeypatch: pytest.MonkeyPatch, cache: Path, alone: Path, offline: Path
) -> None:
    """Each tracker has one run with all epochs, and the student is bit for bit that of a run without trackers."""
    pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    recipe = tiny_run.recipe(cache, offline / "run", loggers=ALL)
    with monkeypatch.context() as patch:
        interrupt(patch, checkpoints, "save_state", 3)
        with pytest.raises(KeyboardInterrupt):
            train_student(recipe)
    train_student(recipe)
    same_runs(alone, offline / "run")
    table = pl.read_parquet(offline / "run" / "metrics.parquet")
    expected = {name: table[name].to_list() for name in ("loss", "test_top1", "learning_rate")}
    assert tensorboard_series(offline / "run" / "tb", expected) == {
        name: pytest.approx(values, rel=1e-6) for name, values in expected.items()
    }
    assert mlflow_series(offline, expected) == expected
    assert wandb_series(offline, expected) == expected


def mlflow_series(offline: Path, names: Any) -> dict[str, list[float]]:
    """The metrics of the only run, which must be finished and have the recipe."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{offline / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("teacher-cache")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "tiny resnet8 kd seed 0"
    assert run.data.params["optimiser.learning_rate"] == "0.05"
    assert run.data.tags["folder"] == str(offline / "run")
    assert run.data.metrics["parameters"] > 70_000
    series = {}
    for name in names:
        points = client.get_metric_history(run.info.run_id, name)
        assert [point.step for point in points] == [0, 1, 2]
        series[name] = [point.value for point in points]
    return series


def wandb_series(offline: Path, names: Any) -> dict[str, list[float]]:
    """The metrics in the files of both processes, which must belong to one run."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, runs = [], []
    for path in sorted(offline.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                rows.append({key: json.loads(text) for key, text in values.items()})
            elif record.WhichOneof("record_type") == "run":
                runs.append(record.run)
    assert len(runs) == 2
    assert len({run.run_id for run in runs}) == 1
    assert runs[0].project == "teacher-cache"
    assert [row["epoch"] for row in rows] == [row["_step"] for row in rows] == [0, 1, 2]
    return {name: [row[name] for row in rows] for name in names}


def wandb_records(file: bytes) -> Iterator[bytes]:
    """W&B's files are LevelDB logs: blocks of 32 KiB with records of (checksum, length, part, data)."""
    position, record = 7, b""
    while position + 7 <= len(file):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        _, length, part = struct.unpack_from("<IHB", file, position)
        record += file[position + 7 : position + 7 + length]
        position += 7 + length
        if part in (1, 4):  # whole, or the last part
            yield record
            record = b""


def tensorboard_series(folder: Path, names: Any) -> dict[str, list[float]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    assert all([scalar.step for scalar in events.Scalars(name)] == [0, 1, 2] for name in names)
    return {name: [scalar.value for scalar in events.Scalars(name)] for name in names}


def test_a_broken_mlflow_does_not_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path, alone: Path, offline: Path
) -> None:
    """After the first epoch its database is overwritten: one warning, and the run equals one without trackers."""
    pytest.importorskip("mlflow")
    broken: list[Path] = []
    save = checkpoints.save_state

    def save_and_break(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        if len(state["history"]) == 2:
            (offline / "mlflow.db").write_bytes(b"no database" * 100_000)
            broken.append(offline / "mlflow.db")

    monkeypatch.setattr(checkpoints, "save_state", save_and_break)
    train_student(tiny_run.recipe(cache, offline / "run", loggers=["mlflow"]))
    assert broken
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: mlflow stopped logging, the run goes on")
    assert json.loads((offline / "run" / "trackers.json").read_text())["mlflow"]["epochs"] == 1
    same_runs(alone, offline / "run")


class Recorder:
    """A tracker that records its calls, and raises at the call `fails_at`."""

    calls: ClassVar[list[Any]] = []
    fails_at: ClassVar[Any] = None
    runs: ClassVar[int] = 0

    def start(self, recipe: TrainRecipe, folder: Path, stored: dict[str, str] | None) -> dict[str, str]:
        self._note("start")
        if stored is None:
            Recorder.runs += 1
        return stored or {"number": str(Recorder.runs)}

    def epoch(self, row: Any) -> None:
        self._note(row["epoch"])

    def finish(self, result: Any) -> None:
        self._note("stopped" if result is None else "finished")

    def _note(self, word: Any) -> None:
        if word == Recorder.fails_at:
            raise ConnectionError("no route\nto host")
        Recorder.calls.append(word)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(Recorder, "calls", [])
    monkeypatch.setattr(Recorder, "fails_at", None)
    monkeypatch.setattr(Recorder, "runs", 0)
    monkeypatch.setitem(trackers.TRACKER_CLASSES, "tensorboard", Recorder)
    return Recorder


ROWS = [{"epoch": number, "loss": 1.0 / (1 + number)} for number in range(5)]


def follow(folder: Path, first: int, last: int, *names: str) -> None:
    """Record epochs `first` to `last` of a run, with a new log as in a new process."""
    recipe = TrainRecipe(name="tiny", cache="tiny", loggers=names)
    with RunLog(folder, recipe, ROWS[:first]) as log:
        for number in range(first, last):
            log.write(ROWS[: number + 1])


def test_a_resumed_run_sends_only_new_epochs(recorder: type[Recorder], tmp_path: Path) -> None:
    follow(tmp_path, 0, 2, "tensorboard")
    follow(tmp_path, 2, 4, "tensorboard")
    assert recorder.calls == ["start", 0, 1, "stopped", "start", 2, 3, "stopped"]
    assert recorder.runs == 1


def test_a_tracker_added_later_receives_all_epochs(recorder: type[Recorder], tmp_path: Path) -> None:
    follow(tmp_path, 0, 2)
    follow(tmp_path, 2, 3, "tensorboard")
    follow(tmp_path, 3, 4)
    follow(tmp_path, 4, 5, "tensorboard")
    assert recorder.calls == ["start", 0, 1, 2, "stopped", "start", 3, 4, "stopped"]


@pytest.mark.parametrize(
    ("fails_at", "calls"),
    [("start", []), (1, ["start", 0]), ("stopped", ["start", 0, 1, 2])],
)
def test_a_broken_tracker_receives_the_missed_epochs_later(
    recorder: type[Recorder],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    fails_at: Any,
    calls: list[Any],
) -> None:
    monkeypatch.setattr(recorder, "fails_at", fails_at)
    follow(tmp_path, 0, 3, "tensorboard")
    assert recorder.calls == calls
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) == 1
    assert warnings[0].endswith("ConnectionError: no route")
    monkeypatch.setattr(recorder, "fails_at", None)
    follow(tmp_path, 3, 4, "tensorboard")
    assert [word for word in recorder.calls if isinstance(word, int)] == [0, 1, 2, 3]
    assert recorder.runs == 1


def test_a_kill_between_the_state_and_the_metrics_loses_no_epoch(recorder: type[Recorder], tmp_path: Path) -> None:
    """The state has epoch 2 and the metrics do not: the process was killed between the two."""
    follow(tmp_path, 0, 2, "tensorboard")
    follow(tmp_path, 3, 4, "tensorboard")
    assert [word for word in recorder.calls if isinstance(word, int)] == [0, 1, 2, 3]


def test_damaged_metrics_are_rewritten(recorder: type[Recorder], tmp_path: Path) -> None:
    follow(tmp_path, 0, 2, "tensorboard")
    (tmp_path / "metrics.parquet").write_bytes(b"PAR1")
    assert epochs_logged(tmp_path) == 0
    with pytest.raises(DataError, match="damaged metrics"):
        read_metrics(tmp_path)
    follow(tmp_path, 2, 2, "tensorboard")
    assert pl.read_parquet(tmp_path / "metrics.parquet").to_dicts() == ROWS[:2]
    assert epochs_logged(tmp_path) == 2


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "{",
        '{"tensorboard": 1}',
        '{"tensorboard": {"run": {"number": "1"}}}',
        '{"tensorboard": {"run": 1, "epochs": -1}}',
    ],
)
def test_a_damaged_record_of_trackers_starts_new_runs(recorder: type[Recorder], tmp_path: Path, text: str) -> None:
    follow(tmp_path, 0, 2, "tensorboard")
    (tmp_path / "trackers.json").write_text(text)
    follow(tmp_path, 2, 3, "tensorboard")
    assert recorder.calls == ["start", 0, 1, "stopped", "start", 0, 1, 2, "stopped"]
    assert recorder.runs == 2
    stored = json.loads((tmp_path / "trackers.json").read_bytes())
    assert stored == {"tensorboard": {"run": {"number": "2"}, "epochs": None}}


def test_overwrite_starts_a_new_run_of_the_tracker(recorder: type[Recorder], cache: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(cache, tmp_path / "run", epochs=1, loggers=["tensorboard"])
    train_student(recipe)
    train_student(recipe)  # finished: nothing to send
    assert (recorder.runs, recorder.calls) == (1, ["start", 0, "finished"])
    train_student(recipe, overwrite=True)
    assert recorder.runs == 2


def test_an_interrupted_run_is_not_marked_finished(
    recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    interrupt(monkeypatch, train.run.train, "train_epoch", 2)
    with pytest.raises(KeyboardInterrupt):
        train_student(tiny_run.recipe(cache, tmp_path / "run", loggers=["tensorboard"]))
    assert recorder.calls == ["start", 0, "stopped"]


@pytest.mark.parametrize(("name", "module"), [("mlflow", "mlflow"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_an_error_before_training_starts(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    arguments = ["--cache", str(cache), "--out", str(tmp_path / "run"), "--device", "cpu"]
    failed = CliRunner().invoke(app, [*arguments, "--log", name])
    assert failed.exit_code == 2
    assert failed.stderr.startswith(f"error: logging to '{name}' needs a package")
    assert f"pip install 'teacher-cache[{name}]'" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_recipe_names_the_trackers(cache: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["digits", "--log", "mlflow, wandb,mlflow", "--show-recipe"])
    assert "loggers:\n- mlflow\n- wandb\n" in shown.stdout
    assert "loggers: []" in CliRunner().invoke(app, ["digits", "--log", "none", "--show-recipe"]).stdout
    assert "loggers: null" in CliRunner().invoke(app, ["digits", "--show-recipe"]).stdout
    wrong = CliRunner().invoke(app, ["digits", "--log", "comet", "--show-recipe"])
    assert wrong.exit_code == 2
    assert "'tensorboard', 'mlflow' or 'wandb'" in wrong.stderr
    followed, alone = (tiny_run.recipe(cache, tmp_path, loggers=names) for names in (ALL, ()))
    assert followed.values() == alone.values(), "trackers are not among the values of a run"
    assert trackers.choose_trackers(tiny_run.recipe(cache, tmp_path, loggers=["tensorboard"] * 2)) == ("tensorboard",)


def interrupt(patch: pytest.MonkeyPatch, place: Any, name: str, call: int) -> None:
    """Raise KeyboardInterrupt at the given call of a function."""
    real, calls = getattr(place, name), []

    def stop(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    patch.setattr(place, name, stop)


def same_runs(one: Path, other: Path) -> None:
    """Check that two runs have byte-identical students and the same metrics, except for timings."""
    for name in (LAST, BEST):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    tables = [pl.read_parquet(folder / "metrics.parquet").drop(TIMINGS) for folder in (one, other)]
    assert tables[0].equals(tables[1])
