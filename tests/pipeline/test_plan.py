import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from cache_tools.images import open_images
from pipeline import plan as planning
from pipeline.cli import app as build_cache
from pipeline.networks import ensemble
from pipeline.plan import Plan, Rate, make_plan
from tests.support import tiny_build

pytestmark = pytest.mark.medium


def make(**changes: Any) -> Plan:
    """50 000 images × 16 views, teachers at 1000 images/s, a student of 240 epochs at 2000."""
    figures: dict[str, Any] = {
        "device": "cpu",
        "samples": 50_000,
        "views": 16,
        "bytes": 10**9,
        "bytes_free": 10**11,
        "computed_per_s": 1000.0,
        "targets_per_s": 1000.0,
        "student": "resnet8x4",
        "student_per_s": 2000.0,
        "epochs": 240,
        "build_s": 800.0,
        "speedup": 3.0,
        "epochs_to_break_even": 16,
        "students_to_break_even": 16 / 240,
    }
    return Plan.model_validate(figures | changes)


def test_a_long_run_pays_for_its_cache() -> None:
    # Live teachers cost 240 epochs × 50 s; the cache 800 s. 12 000 − 800 s = 187 min saved, then 200 min each.
    verdict = make().verdict
    assert "after 16 epochs of training, within the first student of 240 epochs" in verdict
    assert "saves 3 h 07 min there, and 3 h 20 min for every further one" in verdict


def test_a_short_run_does_not() -> None:
    verdict = make(epochs=5, students_to_break_even=3.2).verdict
    assert "that is 4 students of 5 epochs. For a single student, train with live teachers" in verdict
    assert "at most 5 --views" in verdict


def test_cheap_teachers_save_little() -> None:
    assert "saves little: most of the time goes into the student" in make(speedup=1.02).verdict


def test_a_cache_that_saves_nothing() -> None:
    plan = make(epochs_to_break_even=None, students_to_break_even=None, speedup=1.0)
    assert plan.verdict.startswith("The cache saves no time")


def test_a_full_disk_comes_first() -> None:
    assert make(bytes=10**12).verdict.startswith("The disk is too small")


def test_the_command_measures_and_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(planning, "BUDGET_S", 0.1)
    result = CliRunner().invoke(build_cache, ["digits", "--plan", "--plan-student", "resnet8", "--json"])
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert not (tmp_path / "home").exists()
    assert plan["samples"] == 1438
    # float16 logits of 10 classes and 64 features, keys, labels, constants
    assert plan["bytes"] == pytest.approx(8 * 1438 * 2 * (10 + 64), rel=0.1)
    assert (plan["prompts"], plan["checked"], plan["loaded_per_s"]) == (12 * 10, 1438, None)
    assert plan["targets_per_s"] == plan["computed_per_s"]
    setup_s = plan["prompts"] / plan["prompts_per_s"] + plan["checked"] / plan["targets_per_s"]
    assert plan["setup_s"] == pytest.approx(setup_s)
    assert plan["build_s"] == pytest.approx(setup_s + 8 * 1438 / plan["targets_per_s"])
    assert plan["speedup"] == pytest.approx(1 + plan["student_per_s"] / plan["targets_per_s"])
    assert plan["epochs_to_break_even"] == math.ceil(plan["build_s"] / (1438 / plan["targets_per_s"]))
    assert plan["students_to_break_even"] == plan["epochs_to_break_even"] / plan["epochs"]
    assert plan["build_error_s"] > 0
    assert 10 < plan["student_per_s"] < 10**6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_build.prepare(tmp_path_factory.mktemp("plan"), train=30)


def test_pictures_are_loaded_once_for_several_views(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BUDGET_S", 0.1)
    recipe = tiny_build.recipe(root, views={"version": 2, "ops": [{"op": "random-resized-crop", "size": 32}]})
    asked: list[int] = []
    start = ensemble.start_loading_pixels

    def counted(*arguments: Any, **options: Any) -> Any:
        asked.append(len(arguments[5]))
        return start(*arguments, **options)

    monkeypatch.setattr(planning, "start_loading_pixels", counted)
    plan = make_plan(recipe, "resnet8", 1)
    assert set(asked) == {1, 3}, "one view for the networks, all three of the recipe where loading is timed"
    assert plan.loaded_per_s is not None
    # On a CPU, loading and computing take turns.
    assert 1 / plan.targets_per_s == pytest.approx(1 / plan.loaded_per_s + 1 / plan.computed_per_s)
    student_s, loading_s = 1 / plan.student_per_s, 1 / plan.loaded_per_s
    assert plan.speedup == pytest.approx((1 / plan.targets_per_s + student_s) / (loading_s + student_s))
    assert f"loading: {plan.loaded_per_s:,.0f} images/s of each view" in str(plan)
    assert plan.prompts == 12 * 3


def test_the_student_is_timed_on_its_own_views(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the student's size, and both pictures of a mixed view are one sample of its batch."""
    views = {"ops": [{"op": "random-resized-crop", "size": 32}], "sizes": {"student": 24}, "mix": {"mixup_alpha": 0.8}}
    shown: list[tuple[int, ...]] = []

    def step(*_: object) -> Callable[[torch.Tensor, np.ndarray], object]:
        return lambda pixels, index: shown.append((len(pixels) - len(index), *pixels.shape[1:]))

    monkeypatch.setattr(planning, "BUDGET_S", 0.0)
    monkeypatch.setattr(planning, "_student_step", step)
    plan = make_plan(tiny_build.recipe(root, views=views), "resnet8", 1)
    assert set(shown) == {(0, 3, 24, 24)}
    assert plan.student_per_s > 0


def test_beside_a_gpu_the_longer_time_counts() -> None:
    loading, computing = Rate(3.0, 0.3), Rate(2.0, 0.4)
    assert planning._together(torch.device("cuda"), loading, computing) == loading
    assert planning._together(torch.device("cpu"), loading, computing) == pytest.approx((5.0, 0.5))


def test_the_error_is_students_interval_of_the_batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock gives every batch a known time; the first ones are a warm-up."""
    monkeypatch.setattr(planning, "BUDGET_S", 2.0)
    recipe = tiny_build.recipe(root)
    times = [9.0, 9.0, 9.0, 0.5, 0.7, 0.4, 0.6]  # a single image takes long, so batches have one image
    elapsed: list[float] = []

    def clock() -> Iterator[float]:
        now_s = 0.0
        for time_s in times:
            elapsed.append(time_s)
            yield now_s
            now_s += time_s
            yield now_s

    ticks = clock()
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    batches = planning._Batches(open_images(recipe.dataset), recipe, torch.device("cpu"))
    sizes: list[int] = []
    rate = batches.time(lambda pixels, index: sizes.append(len(index)), 32)
    assert (elapsed, sizes) == (times, [1] * 7)
    low, high = stats.t.interval(0.95, 3, np.mean(times[3:]), stats.sem(times[3:]))
    assert rate.mean_s == pytest.approx(np.mean(times[3:]))
    assert rate.error_s == pytest.approx((high - low) / 2)


def test_batches_come_from_all_over_the_images() -> None:
    places = [planning._place(number) for number in range(planning.MAX_BATCHES)]
    assert sorted(places) == list(range(planning.MAX_BATCHES))
    assert max(places[:4]) - min(places[:4]) > planning.MAX_BATCHES // 2


def test_fast_items_are_timed_in_large_batches() -> None:
    cpu = torch.device("cpu")
    assert planning._timed_size(lambda size: 0.001 * size, 256, cpu) == 256
    assert planning._timed_size(lambda size: 0.1 * size, 256, cpu) == 4
    assert planning._timed_size(lambda size: 0.1 * size, 256, torch.device("cuda")) == 256
