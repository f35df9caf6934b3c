"""Sweeps: their trials, shared batches, failures, resuming; each trial equals a single run bit for bit."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from cache_tools.errors import DataError, NotFoundError, OutOfMemoryError, RecipeError, WeightsError
from cache_tools.images import open_images
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import DatasetRecipe
from tests.support import tiny_run
from train.data import open_data
from train.recipe.loading import load_train_recipe
from train.recipe.loss import LossRecipe
from train.run import train_group, train_student
from train.runs.folder import METRICS, STOPPED
from train.sweep.halving import Halving
from train.sweep.progress import SweepProgress
from train.sweep.recipe import Asha, SweepRecipe, make_trials
from train.sweep.run import run_sweep
from train.sweep.search import read_outcome
from train.sweep.streams import batch_streams, image_opener
from train.sweep.table import over_seeds, trials_table
from train.sweep.workers import ProcessEngine, divide_streams

pytestmark = pytest.mark.medium

STUDENTS = ("resnet8", "ShuffleV2", "timm:resnet10t")


def sweep(cache: Path, **changes: Any) -> SweepRecipe:
    base = tiny_run.recipe(cache, Path("unused"), epochs=2).model_dump(mode="json")
    data: dict[str, Any] = {"name": "tiny", "base": {**base, **changes.pop("base", {})}, "students": ("resnet8",)}
    return SweepRecipe.model_validate(data | changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last.safetensors")


def same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_trials_are_the_product_in_order(cache: Path, tmp_path: Path) -> None:
    recipe = sweep(cache, students=("resnet8", "wrn_16_1"), losses=("kd", "ce"), grid={"lr": (0.1, 0.2)}, seeds=2)
    trials = make_trials(recipe, tmp_path)
    names = [trial.name for trial in trials]
    assert names[:3] == ["resnet8-kd-lr=0.1-s0", "resnet8-kd-lr=0.1-s1", "resnet8-kd-lr=0.2-s0"]
    assert len(set(names)) == len(names) == 16
    assert {trial.recipe.optimiser.learning_rate for trial in trials} == {0.1, 0.2}
    labels = [trial.recipe for trial in trials if trial.loss == "ce"]
    assert all(each.cache is None and each.dataset is not None and each.num_views == 3 for each in labels)
    assert len(batch_streams(trials)) == 2  # one per seed


def test_a_grid_over_a_loss_does_not_repeat_trials_on_labels(cache: Path, tmp_path: Path) -> None:
    recipe = sweep(cache, losses=("kd", "ce"), grid={"temperature": (2.0, 4.0)})
    assert [trial.name for trial in make_trials(recipe, tmp_path)] == [
        "resnet8-kd-temperature=2.0-s0", "resnet8-kd-temperature=4.0-s0", "resnet8-ce-temperature=2.0-s0",
    ]  # fmt: skip


def test_loss_settings_do_not_apply_to_labels_alone(cache: Path, tmp_path: Path) -> None:
    kd, labels = make_trials(sweep(cache, losses=("kd", "ce"), loss_settings={"temperature": 7.0}), tmp_path)
    assert kd.recipe.loss == LossRecipe(kind="kd", temperature=7.0)
    assert labels.recipe.loss == LossRecipe(kind="ce")


def test_a_student_has_one_spelling_in_folders_and_recipes(cache: Path, tmp_path: Path) -> None:
    [trial] = make_trials(sweep(cache, students=(), trials=({"student": "shufflenetV2"},)), tmp_path)
    assert (trial.name, trial.settings["student"], trial.recipe.student) == ("ShuffleV2-s0", *["ShuffleV2"] * 2)


def test_trials_with_other_batches_are_in_other_streams(cache: Path, tmp_path: Path) -> None:
    listed = [{"batch_size": 8}, {"batch_size": 16}, {"epochs": 3}, {"num_views": 2}, {"lr": 0.3}]
    listed.append({"lr": 0.4, "compile": "step"})
    trials = make_trials(sweep(cache, students=(), trials=listed), tmp_path)
    assert [[trial.number for trial in stream] for stream in batch_streams(trials)] == [[0], [1, 4], [2], [3], [5]]


@pytest.mark.parametrize("download", [False, True])
def test_trials_with_and_without_targets_open_each_split_once(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: bool
) -> None:
    opened: list[str | None] = []

    def open_split(dataset: DatasetRecipe, split: str | None = None) -> ImageSet:
        opened.append(split)
        return open_images(dataset, split)

    monkeypatch.setattr("train.sweep.streams.open_images", open_split)
    cache = tiny_run.write_cache(tmp_path / "tiny.zarr", pictures, download=download)
    trials = make_trials(sweep(cache, losses=("kd", "ce")), tmp_path)
    assert len(batch_streams(trials)) == 1
    open_once = image_opener()
    for trial in trials:
        open_data(trial.recipe, torch.device("cpu"), open_once)
    assert opened == [None, "test"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"optimiser.lr": (0.1,)}}, "unknown recipe key"),
        ({"grid": {"lr": ()}}, "without values"),
        ({"losses": ("nosuch",)}, "no such loss"),
        ({"trials": ({"lr": 0.1},)}, "not both"),
        ({"students": (), "trials": ({"lr": 0.1}, {"lr": 0.1})}, "are the same"),
        ({"students": ("resnet8", "ResNet8")}, "resnet8-s0 and resnet8-s0"),
    ],
)
def test_bad_sweeps_are_refused(cache: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_trials(sweep(cache, **changes), tmp_path)


def test_a_trial_equals_a_single_run_bit_for_bit(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train dropout, CRD, labels alone and another network side by side, then each alone by its stored recipe."""
    monkeypatch.setattr("train.loop.epoch.BATCHES_PER_TURN", 3)  # several turns per epoch, a short one at the end
    recipe = sweep(
        cache,
        students=(),
        trials=(
            {"student": "resnet8", "loss": "kd"},
            {"student": "resnet8", "loss": "richkd", "loss.crd_negatives": 16},
            {"student": "timm:mobilenetv3_small_050", "loss": "kd", "ema_decay": 0.9},  # has dropout
            {"student": "resnet8", "loss": "ce"},
        ),
    )
    result = run_sweep(recipe, tmp_path / "sweep")
    assert result.trials["status"].to_list() == ["finished"] * 4
    assert len(batch_streams(make_trials(recipe, tmp_path / "sweep"))) == 1
    for number, row in enumerate(result.trials.iter_rows(named=True)):
        _, file, _, _ = row["command"].split()
        alone = load_train_recipe(file, (), {"out": str(tmp_path / f"alone-{number}")})
        train_student(alone)
        same_weights(Path(row["folder"]), tmp_path / f"alone-{number}")


def test_a_diverging_trial_and_one_out_of_memory_affect_no_others(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = sweep(
        cache, students=(), trials=({"lr": 0.05}, {"lr": 1e30}, {"student": "wrn_16_1"}, {"student": "resnet14"})
    )
    import train.zoo.wrn as zoo

    forward = zoo.WideResNet.forward

    def greedy(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        if self.training:
            torch.empty(1 << 50)  # a real allocation that the system refuses
        return forward(self, pixels)

    monkeypatch.setattr(zoo.WideResNet, "forward", greedy)
    result = run_sweep(recipe, tmp_path / "sweep")
    assert result.trials["status"].to_list() == ["finished", "failed", "failed", "finished"]
    assert "diverged" in result.trials["error"][1]
    assert "memory" in result.trials["error"][2]
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert all(escape(error) in page for error in result.trials["error"].drop_nulls())
    assert all(f"{100 * top1:.2f}" in page for top1 in result.trials["top1"].drop_nulls())
    monkeypatch.undo()
    alone = train_student(tiny_run.recipe(cache, tmp_path / "alone", epochs=2, student="resnet14"))
    same_weights(alone.folder, tmp_path / "sweep/trials/resnet14-s0")
    again = run_sweep(recipe, tmp_path / "sweep")
    assert again.trials["status"].to_list() == ["finished", "failed", "failed", "finished"]
    retried = run_sweep(recipe, tmp_path / "sweep", retry_failed=True)
    assert retried.trials["status"].to_list() == ["finished", "failed", "finished", "finished"]


def test_a_trial_out_of_memory_beside_others_is_trained_alone(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train.loop.epoch as loop
    import train.zoo.wrn as zoo

    forward = zoo.WideResNet.forward
    lanes = []
    begin = loop._Participant.__init__

    def counted(self: Any, learner: Any, epoch: int, begun: Any, *, alone: bool) -> None:
        lanes.append(alone)
        begin(self, learner, epoch, begun, alone=alone)

    def greedy(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        if self.training and not lanes[-1]:
            torch.empty(1 << 50)  # a real allocation that the system refuses
        return forward(self, pixels)

    monkeypatch.setattr(loop._Participant, "__init__", counted)
    monkeypatch.setattr(zoo.WideResNet, "forward", greedy)
    result = run_sweep(sweep(cache, students=("wrn_16_1", "resnet8")), tmp_path / "sweep")
    assert result.trials["status"].to_list() == ["finished", "finished"]
    assert (
        "too little memory for 2 trials side by side, later and fewer at a time: wrn_16_1-s0" in capsys.readouterr().err
    )
    alone = train_student(tiny_run.recipe(cache, tmp_path / "alone", epochs=2, student="wrn_16_1"))
    same_weights(alone.folder, tmp_path / "sweep/trials/wrn_16_1-s0")


def test_trials_that_do_not_fit_in_memory_are_halved_until_they_do(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With memory for two, five trials become three and two, and the three become two and one."""
    import train.sweep.streams as streams

    sizes = []
    train = train_group

    def small(runs: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(runs))
        if len(runs) > 2:
            return [OutOfMemoryError("no room") for _ in runs]
        return train(runs, *args, **options)

    monkeypatch.setattr(streams, "train_group", small)
    rates = (0.01, 0.02, 0.03, 0.04, 0.05)
    result = run_sweep(sweep(cache, grid={"lr": rates}, base={"epochs": 1}), tmp_path)
    assert sizes == [5, 3, 2, 2, 1]
    assert set(result.trials["status"]) == {"finished"}


def test_a_larger_sweep_trains_only_new_trials(cache: Path, tmp_path: Path) -> None:
    first = run_sweep(sweep(cache, seeds=1), tmp_path)
    stamp = (Path(first.trials["folder"][0]) / "last.safetensors").stat().st_mtime_ns
    grown = run_sweep(sweep(cache, seeds=2), tmp_path)
    assert grown.trials["status"].to_list() == ["finished"] * 2
    assert (Path(first.trials["folder"][0]) / "last.safetensors").stat().st_mtime_ns == stamp


def test_runs_of_other_settings_are_refused_or_overwritten(cache: Path, pictures: Path, tmp_path: Path) -> None:
    first = run_sweep(sweep(cache, seeds=2), tmp_path).trials
    stored = (tmp_path / "sweep.yaml").read_bytes()
    other = sweep(cache, seeds=3, base={"epochs": 1})
    with pytest.raises(RecipeError, match=r"resnet8-s0: recipe\.epochs 2 there, 1 now; resnet8-s1: .*--overwrite"):
        run_sweep(other, tmp_path)
    rebuilt = tiny_run.write_cache(tmp_path / "rebuilt.zarr", pictures, codec="float32")
    with pytest.raises(RecipeError, match=r"data\.fingerprint"):
        run_sweep(sweep(rebuilt, seeds=2), tmp_path)
    assert (tmp_path / "sweep.yaml").read_bytes() == stored
    assert run_sweep(sweep(cache, seeds=2), tmp_path).trials.equals(first)
    (tmp_path / "trials/resnet8-s1/run.json").write_text("?")
    with pytest.raises(RecipeError, match=r"resnet8-s1: its run\.json"):
        run_sweep(sweep(cache, seeds=2), tmp_path)
    again = run_sweep(other, tmp_path, overwrite=True).trials
    assert again["epochs_done"].to_list() == [1, 1, 1]
    same_weights(run_sweep(other, tmp_path / "fresh").folder / "trials/resnet8-s1", tmp_path / "trials/resnet8-s1")


def test_runs_without_a_finished_epoch_are_replaced(cache: Path, tmp_path: Path) -> None:
    """A trial that failed at once and is retried with other settings; a run without a finished epoch."""
    run_sweep(sweep(cache, base={"optimiser": {"learning_rate": 1e30}}), tmp_path)
    with pytest.raises(RecipeError, match="learning_rate"):
        run_sweep(sweep(cache), tmp_path)
    assert run_sweep(sweep(cache), tmp_path, retry_failed=True).trials["status"].to_list() == ["finished"]
    for kept in ("result.json", "state.pt"):
        (tmp_path / "trials/resnet8-s0" / kept).unlink()
    assert run_sweep(sweep(cache, base={"epochs": 1}), tmp_path).trials["epochs_done"].to_list() == [1]


@pytest.mark.parametrize("text", [None, "[]", "{}", '{"recipe": [], "data": {}}'])
def test_a_run_with_a_damaged_identity_is_replaced_only_with_overwrite(
    cache: Path, tmp_path: Path, text: str | None
) -> None:
    run_sweep(sweep(cache, base={"epochs": 1}), tmp_path)
    identity = tmp_path / "trials/resnet8-s0/run.json"
    identity.unlink() if text is None else identity.write_text(text)
    identity.with_name("result.json").unlink()
    with pytest.raises(RecipeError, match=r"resnet8-s0: its run\.json is missing or damaged\. "):
        run_sweep(sweep(cache, base={"epochs": 1}), tmp_path)
    again = run_sweep(sweep(cache, base={"epochs": 1}), tmp_path, overwrite=True)
    assert again.trials["status"].to_list() == ["finished"]


def test_a_stored_student_in_another_spelling_is_the_same(cache: Path, tmp_path: Path) -> None:
    first = run_sweep(sweep(cache, base={"epochs": 1}), tmp_path).trials
    identity = tmp_path / "trials/resnet8-s0/run.json"
    identity.write_text(identity.read_text().replace('"resnet8"', '"RESNET8"'))
    assert run_sweep(sweep(cache, base={"epochs": 1}), tmp_path).trials.equals(first)


def test_overwrite_keeps_runs_of_the_same_settings(cache: Path, tmp_path: Path) -> None:
    run_sweep(sweep(cache, grid={"lr": (0.05, 1e30)}), tmp_path)
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.glob("trials/*/*.json")}
    assert {"failed.json", "result.json"} <= {file.name for file in stamps}
    run_sweep(sweep(cache, grid={"lr": (0.05, 1e30)}), tmp_path, overwrite=True)
    assert stamps == {file: file.stat().st_mtime_ns for file in tmp_path.glob("trials/*/*.json")}


def test_lost_costs_are_measured_again(cache: Path, tmp_path: Path) -> None:
    first = run_sweep(sweep(cache), tmp_path).trials
    (tmp_path / "costs.json").write_text("{}")
    again = run_sweep(sweep(cache), tmp_path).trials
    assert again.select("parameters", "flops").equals(first.select("parameters", "flops"))


@pytest.mark.parametrize("failure", ["diverged", "memory"])
def test_a_trial_that_fails_in_evaluation_affects_no_others(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """The loss may stay finite while weights or averages of batch norms become infinite."""
    import train.run.state as one_run
    from train.evaluate.metrics import evaluate

    def spoiled(model: Any, *args: Any, **options: Any) -> Any:
        if type(model).__name__ == "WideResNet":
            if failure == "memory":
                torch.empty(1 << 50)  # a real allocation that the system refuses
            next(model.parameters()).data.fill_(torch.inf)
        return evaluate(model, *args, **options)

    monkeypatch.setattr(one_run, "evaluate", spoiled)
    result = run_sweep(sweep(cache, students=("wrn_16_1", "resnet8")), tmp_path / "sweep")
    assert result.trials["status"].to_list() == ["failed", "finished"]
    assert {"diverged": "not finite", "memory": "memory"}[failure] in result.trials["error"][0]
    assert f'"kind": "{failure}"' in (tmp_path / "sweep/trials/wrn_16_1-s0/failed.json").read_text()
    alone = train_student(tiny_run.recipe(cache, tmp_path / "alone", epochs=2))
    same_weights(alone.folder, tmp_path / "sweep/trials/resnet8-s0")


def test_an_error_of_a_process_is_raised_as_it_is(cache: Path, tmp_path: Path) -> None:
    """Its class, message and place, whatever the process prints besides."""
    (trial,) = make_trials(sweep(cache), tmp_path)
    lost = trial.model_copy(update={"recipe": trial.recipe.model_copy(update={"cache": str(tmp_path / "lost.zarr")})})
    with pytest.raises(NotFoundError, match="no cache here") as raised:
        ProcessEngine(2, tmp_path)([[lost]], None)
    assert raised.value.where == str(tmp_path / "lost.zarr")
    assert f"error: {raised.value}" in (tmp_path / "workers.log").read_text()


@pytest.mark.slow
def test_processes_give_the_same_table(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cache_tools.console.LINE_EVERY_S", 0.0)
    recipe = sweep(cache, students=("resnet8", "wrn_16_1"), seeds=2)
    figures = ["trial", "top1", "nll", "ece", "best_epoch"]
    one = run_sweep(recipe, tmp_path / "one").trials.select(figures)
    two = run_sweep(recipe, tmp_path / "two", engine=ProcessEngine(2, tmp_path / "two")).trials.select(figures)
    assert one.equals(two)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sweep, 2 processes: ")]
    epochs = [int(line.split(": ")[1].split("/")[0]) for line in lines]
    assert epochs == sorted(epochs)
    assert epochs[-1] == 2 * 2 * 2


def test_streams_are_divided_to_fill_the_processes(cache: Path, tmp_path: Path) -> None:
    trials = [make_trials(sweep(cache, seeds=8), tmp_path)]
    assert [len(share) for share in divide_streams(trials, 3)] == [3, 3, 2]
    assert [len(share) for share in divide_streams(trials * 4, 2)] == [8, 8, 8, 8]
    assert [len(share) for share in divide_streams(trials * 3, 2)] == [8, 8, 4, 4]
    assert [len(share) for share in divide_streams([trials[0][:1]], 3)] == [1]


def test_damaged_metrics(cache: Path, tmp_path: Path) -> None:
    """An unfinished trial writes them again. For a stopped trial they are an error."""
    trials = make_trials(sweep(cache), tmp_path)
    (trial,) = trials
    trial.folder.mkdir(parents=True)
    (trial.folder / METRICS).write_bytes(b"PAR1")
    (row,) = trials_table(trials, {}).to_dicts()
    assert (row["status"], row["epochs_done"]) == ("waiting", None)
    with SweepProgress("sweep", trials) as progress:
        assert progress.done == 0
    halving = Halving.of_trials(trials, Asha(metric="loss"))
    (trial.folder / STOPPED).write_text("{}")
    for read in (lambda: halving.stop(1, [trial.folder]), lambda: read_outcome(trial, "loss")):
        with pytest.raises(DataError, match=r"damaged metrics.*metrics\.parquet"):
            read()


def test_means_intervals_and_pareto_fronts() -> None:
    rows = []
    for student, top1, parameters in (("a", 0.9, 100), ("b", 0.8, 50), ("c", 0.7, 70)):
        for seed, shift in enumerate((-0.01, 0.0, 0.01)):
            rows.append({
                "trial": f"{student}{seed}", "student": student, "loss": "kd", "seed": seed, "status": "finished",
                "top1": top1 + shift, "top5": None, "nll": 1.0, "ece": 0.1, "train_s": 1.0, "parameters": parameters,
                "flops": parameters, "latency_1_ms": None, "latency_128_ms": 1.0,
            })  # fmt: skip
    table = over_seeds(pl.DataFrame(rows, infer_schema_length=None))
    assert table["student"].to_list() == ["a", "b", "c"]
    np.testing.assert_allclose(table["top1_std"].to_list(), [0.01] * 3)
    np.testing.assert_allclose(table["top1_ci95"].to_list(), [4.303 * 0.01 / 3**0.5] * 3, rtol=1e-3)
    assert table["pareto_parameters"].to_list() == [True, True, False]
    assert table["pareto_latency_1_ms"].to_list() == [None] * 3
    assert table["pareto_latency_128_ms"].to_list() == [True, False, False]


def test_a_misspelt_student_is_refused_before_training(cache: Path, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, WeightsError), match="resnet9"):
        run_sweep(sweep(cache, students=("resnet8", "resnet9")), tmp_path)
    assert not (tmp_path / "trials").exists()


def test_a_missing_cache_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no cache here"):
        run_sweep(sweep(tmp_path / "nosuch.zarr"), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
