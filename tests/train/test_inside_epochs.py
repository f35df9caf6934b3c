"""Checkpoints inside epochs: a run that was stopped anywhere ends with the bytes of one that was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from cache_tools.errors import RecipeError
from tests.support import tiny_run
from tests.support.tiny_run import same_runs
from train import checkpoints
from train.feed import ResidentFeed, StreamingFeed, epoch_order, tiers
from train.loop import Learner
from train.recipe import TrainRecipe
from train.run import Run, train_student
from train.runs import folder as run_files
from train.runs.folder import CHECKPOINT
from train.sweep.recipe import SweepRecipe
from train.sweep.run import run_sweep

STEPS = 4  # of an epoch: 50 images in batches of 16, the last one short
DROPOUT = "timm:mobilenetv3_small_050"
Recipe = Callable[..., TrainRecipe]


def always(cache: Path, out: Path, **changes: Any) -> TrainRecipe:
    """Two epochs, with a checkpoint after every batch."""
    data: dict[str, Any] = {"epochs": 2, "loggers": (), "checkpoint_every_minutes": 1e-9}
    return tiny_run.recipe(cache, out, **(data | changes))


def stop_at_step(patch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Raise KeyboardInterrupt at the count-th step; the list has an entry for each step."""
    steps: list[int] = []
    original = Learner.step

    def step(self: Learner, *arguments: Any) -> None:
        steps.append(len(steps))
        if len(steps) == count:
            raise KeyboardInterrupt
        original(self, *arguments)

    patch.setattr(Learner, "step", step)
    return steps


KINDS: dict[str, dict[str, Any]] = {
    "kd": {},
    "contrast, average, half an update": {
        "loss": {"kind": "kd", "feature": "crd", "crd_negatives": 8},
        "ema_decay": 0.9,
        "optimiser": {"learning_rate": 0.05, "accumulate": 3, "clip_grad_norm": 1.0},
    },
    "dropout": {"student": DROPOUT, "optimiser": {"name": "adamw", "learning_rate": 0.001}},
    "labels alone": {"loss": {"kind": "ce"}},
    "streamed": {"loss": {"kind": "standardised_kd", "warmup_epochs": 3}, "precision": "bfloat16"},
}


@pytest.mark.medium
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_inside_epochs_ends_as_one_that_was_not(
    cache: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    changes = dict(KINDS[kind])
    if kind == "labels alone":
        changes |= {"dataset": tiny_run.dataset(pictures).model_dump()}
    if kind == "streamed":
        monkeypatch.setattr(tiers, "free_memory", lambda device: 0)
    train_student(always(cache, tmp_path / "whole", checkpoint_every_minutes=None, **changes))
    for count in (3, 4):  # in the first epoch, then, two steps before the end of it, in the second one
        with monkeypatch.context() as patch:
            steps = stop_at_step(patch, count)
            with pytest.raises(KeyboardInterrupt):
                train_student(always(cache, tmp_path / "stopped", **changes))
        assert len(steps) == count
        assert (tmp_path / "stopped" / CHECKPOINT).exists()
    with monkeypatch.context() as patch:
        steps = stop_at_step(patch, 1000)
        train_student(always(cache, tmp_path / "stopped", **changes))
    assert len(steps) == 2 * STEPS - 2 - 3, "no step is repeated but the two that were interrupted"
    same_runs(tmp_path / "whole", tmp_path / "stopped")
    assert not (tmp_path / "stopped" / CHECKPOINT).exists()


@pytest.mark.medium
def test_students_that_train_together_may_have_stopped_at_different_batches(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between the checkpoints of two students; the one that is ahead then waits for the others."""
    monkeypatch.setattr("train.loop.epoch.BATCHES_PER_TURN", 1)

    def sweep(minutes: float | None) -> SweepRecipe:
        base = always(cache, Path("unused"), checkpoint_every_minutes=minutes, ema_decay=0.9).model_dump(mode="json")
        trials = ({"student": "resnet8"}, {"student": DROPOUT}, {"loss": "ce"})
        return SweepRecipe.model_validate({"name": "tiny", "base": base, "trials": trials})

    whole = run_sweep(sweep(None), tmp_path / "whole")
    saved: list[Path] = []

    def save(self: Run, *arguments: Any) -> None:
        saved.append(self.path)
        if len(saved) == 8:  # the third checkpoint of the second student
            raise KeyboardInterrupt
        original(self, *arguments)

    original = Run.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_checkpoint", save)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(sweep(1e-9), tmp_path / "stopped")
    positions = [torch.load(path / CHECKPOINT)["batches"] for path in sorted(set(saved))]
    assert sorted(positions) == [2, 2, 3]
    again = run_sweep(sweep(1e-9), tmp_path / "stopped")
    for one, other in zip(whole.trials["folder"], again.trials["folder"], strict=True):
        same_runs(Path(one), Path(other))


def test_checkpoints_are_stored_every_n_minutes(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 25 s: with a checkpoint each minute, after steps 3 (75 s), 6 and 9 of an epoch of ten."""
    clock = [0.0]
    original = Learner.step

    def step(self: Learner, *arguments: Any) -> None:
        clock[0] += 25.0
        original(self, *arguments)

    saved: list[tuple[int, float]] = []
    monkeypatch.setattr(Learner, "step", step)
    monkeypatch.setattr("train.runs.epoch_clock.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(Run, "save_checkpoint", lambda self, state, train_s: saved.append((state["batches"], train_s)))
    train_student(always(cache, tmp_path / "run", checkpoint_every_minutes=1.0, epochs=1, batch_size=5))
    assert saved == [(3, 75.0), (6, 150.0), (9, 225.0)]
    assert pl.read_parquet(tmp_path / "run/metrics.parquet")["train_s"].to_list() == [250.0]


def test_a_continued_epoch_has_the_time_of_all_its_parts(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("train.runs.epoch_clock.time.perf_counter", lambda: clock[0])
    original = Learner.step

    def step(self: Learner, *arguments: Any) -> None:
        clock[0] += 10.0
        original(self, *arguments)

    monkeypatch.setattr(Learner, "step", step)
    with monkeypatch.context() as patch:
        stop_at_step(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train_student(always(cache, tmp_path / "run", epochs=1))
    train_student(always(cache, tmp_path / "run", epochs=1))
    table = pl.read_parquet(tmp_path / "run/metrics.parquet")
    assert table["train_s"].to_list() == [40.0]
    assert table["images_per_s"].to_list() == [50 / 40]


def test_the_result_does_not_depend_on_checkpoints(cache: Path, tmp_path: Path) -> None:
    one, other = (always(cache, tmp_path, checkpoint_every_minutes=minutes) for minutes in (None, 5.0))
    assert one.values() == other.values()
    assert "checkpoint_every_minutes" not in one.model_dump(mode="json"), "old recipes are as before"
    for minutes in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises((ValueError, RecipeError)):
            always(cache, tmp_path, checkpoint_every_minutes=minutes)


@pytest.mark.medium
@pytest.mark.parametrize("leftover", ["earlier epoch", "damaged", "other settings"])
def test_checkpoints_that_cannot_be_used(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], leftover: str
) -> None:
    with monkeypatch.context() as patch:
        stop_at_step(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train_student(always(cache, tmp_path / "run"))
    file = tmp_path / "run" / CHECKPOINT
    first = file.read_bytes()
    assert json.loads((tmp_path / "run" / run_files.IDENTITY).read_text())
    if leftover == "other settings":  # half an epoch is worth asking
        with pytest.raises(RecipeError, match="another run is stored here"):
            train_student(always(cache, tmp_path / "run", seed=1))
        train_student(always(cache, tmp_path / "run", seed=1), overwrite=True)
        assert not file.exists()
        return
    if leftover == "earlier epoch":  # killed after the commit of the epoch, before the checkpoint was removed
        with monkeypatch.context() as patch:
            stop_at_step(patch, 4)
            with pytest.raises(KeyboardInterrupt):
                train_student(always(cache, tmp_path / "run"))
        file.write_bytes(first)
    else:
        file.write_bytes(first[:100])
    train_student(always(cache, tmp_path / "run"))
    train_student(always(cache, tmp_path / "whole"))
    same_runs(tmp_path / "run", tmp_path / "whole")
    assert ("the epoch starts again" in capsys.readouterr().err) == (leftover == "damaged")


def test_an_epoch_goes_on_from_any_batch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also streamed: the same batches, bit for bit."""
    from train.data import open_data

    recipe = always(cache, Path("unused"))
    data = open_data(recipe, torch.device("cpu"))
    whole = list(data.feed(recipe, torch.device("cpu")).epoch(1))
    order = epoch_order(50, recipe.seed, 1)
    for memory, kind in ((1 << 40, ResidentFeed), (0, StreamingFeed)):
        monkeypatch.setattr(tiers, "free_memory", lambda device, memory=memory: memory)
        for first in range(STEPS + 1):
            made = data.feed(recipe, torch.device("cpu"))
            assert isinstance(made, kind)
            rest = list(made.epoch(1, first))
            made.close()
            assert [batch.start for batch in rest] == [16 * number for number in range(first, STEPS)]
            for batch, expected in zip(rest, whole[first:], strict=True):
                assert torch.equal(batch.index, order[batch.start : batch.start + 16])
                assert torch.equal(batch.pixels, expected.pixels)
                assert isinstance(batch.targets.logits, torch.Tensor)
                assert isinstance(expected.targets.logits, torch.Tensor)
                assert torch.equal(batch.targets.logits, expected.targets.logits)


def test_states_load_without_running_code(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at_step(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train_student(always(cache, tmp_path / "run", ema_decay=0.9))
    state = checkpoints.load_state(tmp_path / "run" / CHECKPOINT)
    assert state is not None
    assert (state["epoch"], state["batches"], state["means"]["count"]) == (0, 2, 32)
    assert state["learner"]["updates"] == 2
