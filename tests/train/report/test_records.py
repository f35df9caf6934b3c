"""Read run folders and tables of sweeps: finished, unfinished, failed, moved, damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from cache_tools.errors import DataError, NotFoundError
from tests.support.run_folders import TEACHERS, write_run, write_sweep
from train.report.records import read_run
from train.report.trials import read_table, read_tables, read_trials


def test_a_finished_run(tmp_path: Path) -> None:
    (trial,) = read_run(write_run(tmp_path / "run", top1=0.9, seed=3))
    assert (trial.student, trial.loss, trial.seed, trial.status) == ("resnet8", "kd", 3, "finished")
    assert trial.figures["top1"] == pytest.approx(0.9)
    assert (trial.figures["best_epoch"], trial.figures["parameters"], trial.figures["train_s"]) == (4, 78_042, 50.0)
    assert trial.teachers == TEACHERS
    assert trial.settings["optimiser.learning_rate"] == 0.05
    assert "seed" not in trial.settings
    assert trial.history is not None
    assert trial.predictions is not None
    assert (len(trial.history), len(trial.predictions)) == (4, 400)


def test_an_unfinished_run_has_the_figures_of_its_last_evaluation(tmp_path: Path) -> None:
    (trial,) = read_run(write_run(tmp_path / "run", finished=False, top1=0.7))
    assert (trial.status, trial.error) == ("unfinished", "3 of 4 epochs are done")
    assert trial.figures["top1"] == pytest.approx(0.7)
    assert "parameters" not in trial.figures
    (tmp_path / "run" / "metrics.parquet").unlink()
    (trial,) = read_run(tmp_path / "run")
    assert (trial.error, dict(trial.figures)) == ("0 of 4 epochs are done", {})


def test_a_failed_run_has_its_reason(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", finished=False)
    (path / "failed.json").write_text(json.dumps({"kind": "memory", "message": "out of memory"}))
    (trial,) = read_run(path)
    assert (trial.status, trial.error) == ("failed", "out of memory")


def test_a_run_and_its_twin(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", top1=0.9)
    write_run(path / "labels-only", loss="ce", top1=0.8)
    first, twin = read_run(path)
    assert (first.twin_of, twin.twin_of, twin.loss) == (None, path, "ce")
    both = read_trials([path, path / "labels-only", path])
    assert [trial.folder for trial in both] == [path, path / "labels-only"], "each is listed once"


def test_a_run_without_predictions(tmp_path: Path) -> None:
    (trial,) = read_run(write_run(tmp_path / "run", predictions=False))
    assert (trial.predictions, trial.class_names) == (None, None)


def test_a_sweep_adds_costs_command_and_status(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"resnet8": 0.8}, seeds=2)
    trials = {(trial.student, trial.seed): trial for trial in read_trials([], read_table(sweep))}
    first = trials["resnet8", 0]
    assert first.figures["flops"] == 1.5e6
    assert first.figures["latency_1_ms"] == 1.1
    assert first.figures["top1"] == pytest.approx(0.8)
    assert first.command == "train-student digits --student resnet8 --loss kd --seed 0"
    stopped, failed = trials["ShuffleV1", 0], trials["resnet110", 0]
    assert (stopped.status, stopped.error) == ("stopped", "not among the best half")
    assert stopped.history is not None
    assert (failed.status, failed.folder, dict(failed.figures)) == ("failed", None, {})
    assert "out of memory" in failed.error


def test_a_moved_sweep(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"resnet8": 0.8}, seeds=1)
    moved = Path(shutil.move(sweep, tmp_path / "moved"))
    (trial, *_) = read_trials([], read_table(moved))
    assert trial.folder == moved / "trials" / "resnet8-kd-0"
    assert trial.history is not None


def test_a_copied_sweep_shows_its_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was started with a relative path, at which another sweep is now."""
    monkeypatch.chdir(tmp_path)
    sweep = write_sweep(Path("sweep"), {"resnet8": 0.8}, seeds=1)
    copied = Path(shutil.move(sweep, tmp_path / "colleague"))
    shutil.rmtree(copied / "trials" / "stopped")
    write_sweep(Path("sweep"), {"resnet8": 0.6}, seeds=1)
    trials = {trial.student: trial for trial in read_trials([], read_table(copied))}
    assert trials["resnet8"].figures["top1"] == pytest.approx(0.8)
    assert trials["resnet8"].history is not None
    assert trials["ShuffleV1"].history is None, "its run is lost, and the other sweep's run is not used"


def test_a_table_without_its_runs_still_has_figures(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"resnet8": 0.8}, seeds=1)
    shutil.rmtree(sweep / "trials" / "resnet8-kd-0")
    table = read_table(sweep).with_columns(top1=pl.lit(0.75), best_epoch=pl.lit(7))
    trial = next(trial for trial in read_trials([], table) if trial.student == "resnet8")
    assert (trial.figures["top1"], trial.figures["best_epoch"], trial.history) == (0.75, 7, None)


def test_runs_and_sweeps_together(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    sweeps = [write_sweep(tmp_path / name, {"resnet8": 0.8}, seeds=1) for name in ("one", "two")]
    folders, table = read_tables([sweeps[0], run, sweeps[1]])
    assert folders == [run]
    assert table is not None
    assert len(table) == 6
    assert len(read_trials(folders, table)) == 1 + 2 * 2 + 2
    assert read_tables([run]) == ([run], None)


def test_a_sweep_without_a_table(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / "sweep" / "trials" / f"resnet8-s{seed}", seed=seed, finished=seed == 0)
    folders, table = read_tables([tmp_path / "sweep"])
    assert table is None
    assert [trial.status for trial in read_trials(folders)] == ["finished", "unfinished"]


def damages() -> dict[str, tuple[type[Exception], str]]:
    return {
        "nothing": (NotFoundError, "no run of train-student here.*found nothing"),
        "a file": (NotFoundError, "no run of train-student here"),
        "something else": (NotFoundError, "no run of train-student here.*no run.json"),
        "run.json": (DataError, "damaged record of a run"),
        "a list in run.json": (DataError, "damaged record of a run"),
        "metrics.parquet": (DataError, "damaged metrics"),
        "trials.parquet": (DataError, "damaged table of trials"),
        "another trials.parquet": (DataError, "not a table of trials.*no folder"),
    }


@pytest.mark.parametrize("case", damages())
def test_damage_is_one_clear_line(tmp_path: Path, case: str) -> None:
    path = tmp_path / "run"
    if case == "a file":
        path.write_text("")
    elif case == "something else":
        path.mkdir()
    elif case != "nothing":
        write_run(path)
    if case in {"run.json", "metrics.parquet", "trials.parquet"}:
        (path / case).write_bytes(b'{"recipe": {')
    elif case == "a list in run.json":
        (path / "run.json").write_text("[]")
    elif case == "another trials.parquet":
        table = pl.DataFrame({"student": ["a"], "loss": ["kd"], "seed": [0], "status": ["finished"]})
        table.write_parquet(path / "trials.parquet")
    kind, words = damages()[case]
    with pytest.raises(kind, match=words) as caught:
        read_trials(*read_tables([path]))
    assert "\n" not in str(caught.value)


def test_a_trial_without_a_stored_recipe_comes_from_the_table(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"resnet8": 0.8}, seeds=1)
    (sweep / "trials" / "stopped" / "recipe.yaml").unlink()
    trials = {trial.student: trial for trial in read_trials(*read_tables([sweep]))}
    assert set(trials) == {"resnet8", "ShuffleV1", "resnet110"}
    assert (trials["ShuffleV1"].status, trials["ShuffleV1"].error) == ("stopped", "not among the best half")
