"""Which trial starts next on which GPU, played with trials that take memory, end, and run out of it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import tiny_run
from train.sweep.packing import Packing, memory_key

MOST_EVENTS = 10_000


@dataclass
class World:
    """GPUs and trials, and what happened to them.

    Attributes:
        keys: of the trials.
        needs: bytes that a trial of a key takes in truth.
        budgets: bytes of each GPU, as the packing is told.
        free: bytes of each GPU in truth.
        most: number of trials that may run at a time.
        peaks: key → bytes that earlier trials have held.
        starts: (trial, GPU) in order.
        failed, ended: trials.
    """

    keys: list[str]
    needs: dict[str, int]
    budgets: dict[str, int]
    free: dict[str, int]
    most: int = 100
    peaks: dict[str, int] = field(default_factory=dict)
    starts: list[tuple[int, str]] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)

    def play(self, seed: int = 0) -> World:
        """Run all trials to their end, in a random order of events, and check every start."""
        self._packing = Packing(self.keys, self.budgets, self.peaks, self.most)
        self._running, self._rooms = dict[int, str](), dict[int, int]()
        self._company, self._alone = set[int](), set[int]()
        self._known = dict(self.peaks)
        rng = random.Random(seed)
        for _ in range(MOST_EVENTS):
            while (start := self._packing.start()) is not None:
                self._check_start(*start)
            if not self._running:
                break
            trial = rng.choice(sorted(self._running))
            if self._takes(self._running[trial], self.needs) > self.free[self._running[trial]]:
                self._run_out(trial)
            elif rng.random() < 0.5:
                self._measure(trial)
            else:
                del self._running[trial]
                self._rooms.pop(trial, None)
                self._packing.end(trial)
                self.ended.append(trial)
        assert self._packing.is_over
        assert sorted(self.ended + self.failed) == list(range(len(self.keys))), "every trial ends, once"
        return self

    def _takes(self, gpu: str, sizes: dict[str, int]) -> int:
        return sum(sizes[self.keys[trial]] for trial, place in self._running.items() if place == gpu)

    def _check_start(self, trial: int, gpu: str) -> None:
        """Check that by the estimates the trial fits: what is known of its key or else, of some, all that is left."""
        others = {other for other, place in self._running.items() if place == gpu}
        budget, key = self._packing.budgets[gpu], self.keys[trial]
        is_again = trial in [earlier for earlier, _ in self.starts]
        taken = sum(self._rooms.get(other, self._known.get(self.keys[other], 0)) for other in others)
        if is_again or self._known.get(key, 0) > max(self._packing.budgets.values()):
            assert not others, "it is alone"
            self._alone.add(trial)
            self._rooms[trial] = budget
        elif key in self._known:
            assert taken + self._known[key] <= budget
        else:
            assert 2 * taken <= budget, "half of the GPU is free for a trial like no other before"
            self._rooms[trial] = budget - taken
        self._running[trial] = gpu
        self.starts.append((trial, gpu))
        if others:
            self._company |= {*others, trial}
        assert len(self._running) <= self.most

    def _measure(self, trial: int) -> None:
        key = self.keys[trial]
        self._packing.measure(trial, self.needs[key])
        self._known[key] = max(self.needs[key], self._known.get(key, 0))
        if trial not in self._alone:
            self._rooms.pop(trial, None)

    def _run_out(self, trial: int) -> None:
        had_company = trial in self._company
        self._company.discard(trial)
        del self._running[trial]
        self._rooms.pop(trial, None)
        assert self._packing.retry_with_more_memory(trial) == had_company
        if not had_company:
            self.failed.append(trial)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    needs = draw(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 30), min_size=1))
    keys = draw(st.lists(st.sampled_from(sorted(needs)), min_size=1, max_size=16))
    gpus = [f"GPU-{number}" for number in range(draw(st.integers(1, 3)))]
    budgets = {gpu: draw(st.integers(0, 40)) for gpu in gpus}
    free = {gpu: draw(st.integers(0, 60)) for gpu in gpus}
    peaks = draw(st.dictionaries(st.sampled_from(sorted(needs)), st.integers(0, 40)))
    return World(keys, needs, budgets, free, draw(st.integers(1, 6)), peaks)


@given(worlds(), st.integers(0, 1000))
def test_trials_fit_by_the_estimates_and_all_end(world: World, seed: int) -> None:
    played = world.play(seed)
    counts = Counter(trial for trial, _ in played.starts)
    assert max(counts.values()) <= 2, "a trial is tried again once"
    for key in {*world.keys}:
        if world.needs[key] <= min(world.free.values()) / len(world.keys):  # it never runs out of memory
            assert not {trial for trial in played.failed if world.keys[trial] == key}
    same = World(world.keys, world.needs, world.budgets, world.free, world.most, world.peaks).play(seed)
    assert same.starts == played.starts, "the same events give the same order"


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.integers(1, 3), st.integers(0, 99))
def test_trials_of_one_student_start_in_their_order(keys: list[str], count: int, seed: int) -> None:
    sizes = {f"GPU-{number}": 30 for number in range(count)}
    played = World(keys, {"a": 4, "b": 9, "c": 28}, sizes, sizes).play(seed)
    for key in {*keys}:
        starts = list(dict.fromkeys(trial for trial, _ in played.starts if keys[trial] == key))
        assert starts == sorted(starts)
    assert not played.failed


def test_a_gpu_is_filled_once_a_student_is_measured() -> None:
    packing = Packing(["a"] * 5, {"0": 100}, {}, 100)
    assert packing.start() == (0, "0")
    assert packing.start() is None
    packing.measure(0, 30)
    assert [packing.start() for _ in range(3)] == [(1, "0"), (2, "0"), None]
    assert packing.used("0") == 90
    packing.end(1)
    assert packing.start() == (3, "0")


def test_earlier_figures_fill_the_gpus_at_once() -> None:
    packing = Packing(["a"] * 5, {"0": 60, "1": 90}, {"a": 30}, 100)
    assert [packing.start() for _ in range(6)] == [(0, "1"), (1, "0"), (2, "1"), (3, "0"), (4, "1"), None]
    assert [Packing(["a"] * 5, {"0": 900}, {"a": 30}, 2).start() for _ in range(2)] == [(0, "0")] * 2
    few = Packing(["a"] * 5, {"0": 900}, {"a": 30}, 2)
    assert [few.start() for _ in range(3)] == [(0, "0"), (1, "0"), None]


def test_a_new_student_joins_where_half_is_free_and_is_not_overtaken() -> None:
    """A GPU is kept for it: trials that are known do not fill all of them."""
    packing = Packing(["a", "b", "a", "a"], {"0": 100}, {"a": 60}, 100)
    assert packing.start() == (1, "0"), "the new one first"
    packing.measure(1, 30)
    assert packing.start() == (0, "0")
    assert packing.start() is None
    more = Packing(["a", "a", "b"], {"0": 100, "1": 90}, {"a": 30}, 100)
    assert more.start() == (2, "0")
    assert [more.start() for _ in range(3)] == [(0, "1"), (1, "1"), None]


def test_out_of_memory_is_tried_again_alone_at_the_end() -> None:
    packing = Packing(["a", "a", "a"], {"0": 100}, {"a": 40}, 100)
    assert [packing.start() for _ in range(3)] == [(0, "0"), (1, "0"), None]
    assert packing.retry_with_more_memory(1)
    assert packing.budgets == {"0": 72}, "0.9 of what ran there by the estimates"
    assert packing.start() is None
    packing.end(0)
    assert [packing.start() for _ in range(2)] == [(2, "0"), None]
    packing.end(2)
    assert packing.start() == (1, "0")
    assert not packing.retry_with_more_memory(1)
    assert packing.is_over


def test_a_trial_that_had_the_gpu_for_itself_fails() -> None:
    packing = Packing(["a"], {"0": 100}, {}, 100)
    assert packing.start() == (0, "0")
    assert not packing.retry_with_more_memory(0)
    assert packing.is_over


def test_a_trial_whose_process_has_died_is_tried_again_once() -> None:
    packing = Packing(["a"], {"0": 100}, {}, 100)
    assert packing.start() == (0, "0")
    assert packing.retry(0)
    assert packing.start() == (0, "0")
    assert not packing.retry(0)
    assert packing.is_over


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 3}, {"epochs": 9}, {"optimiser": {"learning_rate": 0.3}},
        {"loss": {"temperature": 9.0}}, {"name": "other"},
    ],
)  # fmt: skip
def test_what_changes_no_memory(changes: dict[str, object]) -> None:
    base = tiny_run.recipe("c.zarr", Path("out"))
    assert memory_key(tiny_run.recipe("c.zarr", Path("out"), **changes)) == memory_key(base)
    assert memory_key(base).startswith("resnet8 ")


@pytest.mark.parametrize(
    "changes",
    [
        {"student": "wrn_16_1"}, {"batch_size": 32}, {"loss": {"feature": "crd"}}, {"precision": "bfloat16"},
        {"ema_decay": 0.9}, {"optimiser": {"name": "adamw"}}, {"cache": "other.zarr"}, {"pixels": {"device_memory": 0}},
    ],
)  # fmt: skip
def test_what_changes_memory(changes: dict[str, object]) -> None:
    base = tiny_run.recipe("c.zarr", Path("out"))
    cache = changes.pop("cache", "c.zarr")
    assert memory_key(tiny_run.recipe(str(cache), Path("out"), **changes)) != memory_key(base)
