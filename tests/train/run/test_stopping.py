"""A signal or a limit of time ends training after a checkpoint, and the same command goes on to the same result."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cache_tools import console
from cache_tools.console import OUT_OF_TIME, Stopped, StopRequest, interrupted_by_signals
from pipeline.build import build_cache
from tests.support import tiny_build, tiny_run
from tests.support.tiny_build import arrays_of
from tests.support.turns import slow
from train.run import train_student


def stop_at(monkeypatch: pytest.MonkeyPatch, look: int) -> None:
    """Answer the look of this number at the request, counted from 1, with a signal."""
    looks = iter(range(1, 10_000))
    reason = Stopped.by_signal(signal.SIGUSR1)
    monkeypatch.setattr(StopRequest, "pending", property(lambda self: reason if next(looks) >= look else None))


EMA: dict[str, Any] = {"ema_decay": 0.9}
ACCUMULATE: dict[str, Any] = {"optimiser": {"learning_rate": 0.05, "accumulate": 2}}


# Four batches an epoch: three looks inside and one after it.
@pytest.mark.parametrize(
    ("changes", "look"),
    [
        (EMA, 1),
        (EMA, 4),
        (ACCUMULATE, 2),
        (ACCUMULATE, 7),
        slow(EMA, 2),
        slow(EMA, 7),
        slow(ACCUMULATE, 1),
        slow(ACCUMULATE, 4),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else str(value),
)
def test_a_run_that_was_stopped_anywhere_ends_as_one_that_was_not(
    cache: Path, tmp_path: Path, look: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_run.recipe(cache, tmp_path / "run", loggers=(), **changes)
    with monkeypatch.context() as patch:
        stop_at(patch, look)
        with pytest.raises(Stopped, match="Stopped by SIGUSR1") as stopped:
            train_student(recipe)
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert (tmp_path / "run/checkpoint.pt").exists() == (look != 4)
    train_student(recipe)
    train_student(recipe.model_copy(update={"out": tmp_path / "whole"}))
    tiny_run.same_runs(tmp_path / "run", tmp_path / "whole")


def test_training_ends_after_its_minutes(cache: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(cache, tmp_path / "run", max_minutes=1e-9, loggers=())
    for _ in range(2):  # each time it gets one batch further
        with pytest.raises(Stopped, match=r"Stopped after --max-minutes 1e-09") as stopped:
            train_student(recipe)
        assert stopped.value.code == OUT_OF_TIME == 75
    train_student(recipe.model_copy(update={"max_minutes": None}))
    train_student(recipe.model_copy(update={"max_minutes": None, "out": tmp_path / "whole"}))
    tiny_run.same_runs(tmp_path / "run", tmp_path / "whole")


def test_a_build_ends_after_its_minutes_and_keeps_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tiny_build.prepare(tmp_path)
    whole = build_cache(tiny_build.recipe(root, out=tmp_path / "whole.zarr"))
    recipe = tiny_build.recipe(root, out=tmp_path / "cache.zarr", max_minutes=5.0)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped):
            build_cache(recipe)
    assert not list(tmp_path.glob(".cache.zarr.claims/*"))
    assert arrays_of(build_cache(recipe).path) == arrays_of(whole.path)


def test_the_first_signal_is_a_request_and_the_second_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "REPEATED_S", 0.0)
    request = StopRequest()
    with interrupted_by_signals():
        with request.deferred():
            before = request.pending
            signal.raise_signal(signal.SIGTERM)
            after = request.pending
            assert before is None
            assert after is not None
            assert (after.reason, after.code) == ("Stopped by SIGTERM", 143)
            with pytest.raises(Stopped, match="SIGUSR1"):
                signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(Stopped, match="SIGTERM"):  # nothing is deferred any more
            signal.raise_signal(signal.SIGTERM)


def test_work_that_does_not_look_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "REPEATED_S", 0.0)
    monkeypatch.setattr(console, "GRACE_S", 0.2)
    with interrupted_by_signals(), StopRequest().deferred():
        begun_s = time.monotonic()
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(Stopped, match="SIGUSR1"):
            threading.Event().wait(60)
    assert time.monotonic() - begun_s < 30


def test_a_request_that_was_answered_leaves_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "GRACE_S", 0.05)
    request = StopRequest()
    with interrupted_by_signals():
        with request.deferred():
            signal.raise_signal(signal.SIGTERM)
        time.sleep(0.2)  # a signal now would be a Stopped
