"""The state after an epoch is stored while the next epoch trains; nothing is lost, and errors are raised."""

from __future__ import annotations

import copy
import errno
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_tools.console import Stopped, StopRequest
from tests.support import tiny_run
from train import checkpoints
from train.loop import Learner
from train.run import train_student
from train.run.background import BackgroundWriter, Snapshot
from train.runs.metrics import RunLog

CPU = torch.device("cpu")


def test_training_goes_on_while_the_state_is_stored(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four batches an epoch. No state is written before the next epoch has made a step, and yet it is the right one."""
    save, step, write = checkpoints.save_state, Learner.step, RunLog.write
    went_on, events, states = threading.Condition(), [], []
    is_slow, updates = True, 0

    def watched_step(learner: Learner, *args: Any) -> None:
        nonlocal updates
        step(learner, *args)
        with went_on:
            updates = learner.updates
            went_on.notify_all()

    def slow_save(path: Path, state: Any) -> None:
        epochs = len(state["history"])
        with went_on:
            is_ahead = not is_slow or epochs == 3 or went_on.wait_for(lambda: updates > 4 * epochs, 20)
        assert is_ahead, "training waits for the disk"
        save(path, state)
        events.append("state")
        states.append(copy.deepcopy(state["learner"]["student"]))

    def watched_write(log: RunLog, *args: Any) -> None:
        events.append("metrics")
        write(log, *args)

    monkeypatch.setattr(checkpoints, "save_state", slow_save)
    monkeypatch.setattr(Learner, "step", watched_step)
    monkeypatch.setattr(RunLog, "write", watched_write)
    recipe = tiny_run.recipe(cache, tmp_path / "run", loggers=(), epochs=3)
    train_student(recipe)
    assert events == ["state", "metrics"] * 3
    is_slow = False
    train_student(recipe.model_copy(update={"out": tmp_path / "plain"}))
    tiny_run.same_runs(tmp_path / "run", tmp_path / "plain")
    for one, other in zip(states[:3], states[3:], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stopped", [False, True])
def test_an_error_in_the_background_ends_the_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """Also one that is asked to end, which must not seem to have stored its last epoch."""
    failed = threading.Event()

    def fail(path: Path, state: Any) -> None:
        failed.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_state", fail)
    if stopped:
        reason = Stopped.by_signal(signal.SIGTERM)
        monkeypatch.setattr(StopRequest, "pending", property(lambda self: reason if failed.is_set() else None))
    with pytest.raises(OSError, match="No space left"):
        train_student(tiny_run.recipe(cache, tmp_path / "run", loggers=(), epochs=3))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("state")]


def test_a_writer_keeps_the_order_and_its_error() -> None:
    writer, go = BackgroundWriter(), threading.Event()
    done: list[int] = []
    writer.begin(lambda: done.append(int(go.wait(20))))
    assert not writer.is_idle
    go.set()
    writer.begin(lambda: done.append(2))
    writer.wait()
    assert done == [1, 2]
    writer.begin(lambda: done.remove(5))
    for call in (writer.wait, writer.wait, lambda: writer.begin(done.clear)):
        with pytest.raises(ValueError, match="not in list"):
            call()
    writer.close()
    assert done == [1, 2]


def test_a_snapshot_does_not_change_with_the_state() -> None:
    weight = torch.arange(6.0).view(2, 3)
    state = {"a": weight, "tied": weight.view(2, 3), "groups": [{"betas": (0.9, weight[0])}], "step": 3, "none": None}
    snapshot = Snapshot(state, CPU)
    weight.zero_()
    copied = snapshot.get()
    assert torch.equal(copied["a"], torch.arange(6.0).view(2, 3))
    assert copied["tied"].data_ptr() == copied["a"].data_ptr()
    assert torch.equal(copied["groups"][0]["betas"][1], torch.arange(3.0))
    assert (copied["groups"][0]["betas"][0], copied["step"], copied["none"]) == (0.9, 3, None)
    network = torch.nn.BatchNorm2d(2)
    assert Snapshot(network.state_dict(), CPU).get()._metadata == network.state_dict()._metadata  # type: ignore[attr-defined]
