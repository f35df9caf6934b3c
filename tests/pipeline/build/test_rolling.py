"""`build-cache --keep-views`: old views are dropped behind the students that follow the build."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cache_tools.console import Stopped
from cache_tools.errors import DroppedError, RecipeError
from cache_tools.places import open_place
from cache_tools.places.leases import leases_place
from cache_tools.places.metadata import manifest_at
from cache_tools.places.transfer import list_committed
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice
from pipeline.build import rolling
from pipeline.build.cache import build_cache
from pipeline.recipe import BuildRecipe
from tests.support import tiny_build, tiny_run
from tests.support.child import Child, in_child
from tests.support.in_process import invoke
from tests.support.s3_server import new_bucket
from tests.support.turns import turns
from train.feed import following
from train.recipe import TrainRecipe
from train.run import train_student

KEEP = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_build.prepare(tmp_path_factory.mktemp("rolling"), train=32)


@pytest.fixture(autouse=True)
def short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "FIRST_LOOK_S", 0.02)
    monkeypatch.setattr(following, "LONGEST_LOOK_S", 0.05)
    monkeypatch.setattr(rolling, "FIRST_LOOK_S", 0.02)
    monkeypatch.setattr(rolling, "LONGEST_LOOK_S", 0.05)


def build_recipe(root: Path, out: object, **changes: Any) -> BuildRecipe:
    own = {"num_views": 6, "keep_views": KEEP, "block_rows": 16, "clip": None, "fusion": {"feature_dim": 8}}
    return tiny_build.recipe(root, out=out, **(own | changes))


def train_recipe(cache: object, out: Path, epochs: int, **changes: Any) -> TrainRecipe:
    own = {"epochs": epochs, "follow": True, "loggers": (), "batch_size": 16, "evaluate_every": epochs}
    return tiny_run.recipe(str(cache), out, **(own | changes))


def views_there(cache: Path) -> set[int]:
    """Views of which any file is there."""
    names = [file.name for array in ("commits", "fused_logits") for file in (cache / array).glob("c.*.0")]
    return {int(name.split(".")[1]) for name in names}


class Watch(threading.Thread):
    """Counts views until it is stopped."""

    def __init__(self, count: Callable[[], set[int]]) -> None:
        super().__init__(daemon=True)
        self._count, self._stop_now, self.most = count, threading.Event(), 0

    def run(self) -> None:
        while not self._stop_now.wait(0.002):
            self.most = max(self.most, len(self._count()))

    def __exit__(self, *exc: object) -> None:
        self._stop_now.set()
        self.join()

    def __enter__(self) -> Watch:
        self.start()
        return self


def at_home(home: Path, function: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
    """A function for a process that has a cache home of its own."""

    def call() -> None:
        torch.set_num_threads(1)
        os.environ["TEACHER_CACHE_HOME"] = str(home)
        function(*arguments)

    return call


def trained_from_all_views(root: Path, folder: Path, views: int) -> Path:
    """A run from a cache that keeps all its views."""
    whole = build_recipe(root, folder / "whole.zarr", num_views=views, keep_views=None)
    in_child(at_home(folder / "third", build_cache, whole), folder / "log")
    recipe = train_recipe(whole.out, folder / "later", views, follow=False)
    in_child(at_home(folder / "third", train_student, recipe), folder / "log")
    return folder / "later"


@pytest.mark.medium
@pytest.mark.turns
@pytest.mark.alone
def test_killed_builders_and_students_go_on(root: Path, tmp_path: Path) -> None:
    """At random instants, again and again: never too many views, and the weights of a complete cache."""
    views, rng = turns(6, 30), random.Random(0)
    cache, killed = tmp_path / "rolling.zarr", [0, 0]
    build, train = build_recipe(root, cache, num_views=views), train_recipe(cache, tmp_path / "follows", views)
    starts = [lambda: Child(lambda: _quiet(build_cache, build), tmp_path / "builder")]
    starts += [lambda: Child(lambda: _quiet(train_student, train), tmp_path / "student")]
    with Watch(lambda: views_there(cache)) as watch:
        running: dict[int, Child] = {}
        waiting = set(range(2))
        while waiting:
            for number in waiting - running.keys():
                running[number] = starts[number]()
            time.sleep(rng.uniform(0.1, 0.6))
            number = min(sorted(running), key=killed.__getitem__)  # so that both are killed
            child = running.pop(number)
            if sum(killed) < turns(4, 40):
                if child.kill():
                    killed[number] += 1
                else:
                    waiting.discard(number)
                continue
            answer = child.wait()
            assert "result" in (answer or {}), answer
            waiting.discard(number)
    assert min(killed) > 0
    assert 1 < watch.most <= KEEP
    assert views_there(cache) == {views - 2, views - 1}
    assert not list(tmp_path.glob(".rolling.zarr.followers/*"))
    tiny_run.same_runs(tmp_path / "follows", trained_from_all_views(root, tmp_path, views))


def _quiet(function: Callable[[Any], Any], recipe: Any) -> None:
    torch.set_num_threads(1)
    function(recipe)


@pytest.mark.alone
def test_a_build_into_a_store_is_followed_from_another_machine(server: str, root: Path, tmp_path: Path) -> None:
    views, url = 5, f"s3://{new_bucket()}/caches/rolling.zarr"
    build, train = build_recipe(root, url, num_views=views), train_recipe(url, tmp_path / "follows", views)
    builder = Child(at_home(tmp_path / "one", build_cache, build), tmp_path / "builder")
    student = Child(at_home(tmp_path / "other", train_student, train), tmp_path / "student")
    for child, log in ((student, "student"), (builder, "builder")):
        answer = child.wait()
        assert "result" in (answer or {}), (answer, (tmp_path / log).read_text())
    place = open_place(url)
    assert {block.view for block in list_committed(place)} == {3, 4}
    assert manifest_at(place).num_dropped == 3
    assert not list(leases_place(place).keys())
    [mirror] = (tmp_path / "one").glob("tiny-*.zarr")
    assert views_there(mirror) == {3, 4}, "the builder's mirror is no larger"
    tiny_run.same_runs(tmp_path / "follows", trained_from_all_views(root, tmp_path, views))


# What a rolling cache says, in one process


@pytest.fixture(scope="module")
def rolled(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of four views, of which the first two are dropped."""
    folder = tmp_path_factory.mktemp("rolled")
    cache = folder / "rolled.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "FIRST_LOOK_S", 0.02)
        patch.setattr(rolling, "FIRST_LOOK_S", 0.02)
        builder = threading.Thread(target=build_cache, args=[build_recipe(root, cache, num_views=4)])
        builder.start()
        train_student(train_recipe(cache, folder / "run", 4))
        builder.join()
    return cache


def test_readers_say_that_views_were_dropped(rolled: Path, tmp_path: Path) -> None:
    cache = TeacherCache.open(rolled)
    assert cache.complete_views == (2, 3)
    assert "2 of 4 complete; views 0–1 were dropped" in cache.describe()
    with pytest.raises(DroppedError, match=r"view 1 was dropped.*--keep-views 2.*--out"):
        cache.load_view(1)
    cache.load_view(2)
    with pytest.raises(DroppedError, match=r"views 0–1 were dropped"):
        train_student(train_recipe(rolled, tmp_path / "run", 4, follow=False))
    with pytest.raises(DroppedError, match=r"view 0 was dropped"):
        train_student(train_recipe(rolled, tmp_path / "run", 4))
    assert not (tmp_path / "run/state.pt").exists()


def test_commands_say_that_views_were_dropped(rolled: Path) -> None:
    verified = invoke("cache-tools", "verify", rolled)
    assert verified.exit_code == 0
    assert "sound: 4 of 8 blocks" in verified.stdout
    assert "(views 0–1 were dropped)" in verified.stdout
    assert "2/4, 2 dropped" in invoke("cache-tools", "ls", rolled.parent).stdout
    assert "views 0–1 were dropped behind students that followed; all views were built" in (
        invoke("cache-tools", "info", rolled).stdout
    )
    assert "2 of the cache's 4 views were analysed" in invoke("cache-tools", "stats", rolled).stdout
    assert invoke("train-student", "--cache", rolled).exit_code == 2


def test_another_build_does_not_compute_dropped_views_again(rolled: Path, root: Path) -> None:
    before, said = tiny_build.files_of(rolled), list[str]()
    for changes in ({"num_views": 4}, {"num_views": 4, "keep_views": None}):
        assert build_cache(build_recipe(root, rolled, **changes), said.append).images == 0
        assert said.pop() == f"{rolled} has been built, and views 0–1 were dropped: nothing to do"
    assert tiny_build.files_of(rolled) == before


def test_a_cache_that_keeps_its_views_goes_on_keeping_them(root: Path, tmp_path: Path) -> None:
    whole = build_recipe(root, tmp_path / "whole.zarr", num_views=1, keep_views=None)
    build_cache(whole)
    with pytest.raises(RecipeError, match=r"keep all its views.*Leave out --keep-views"):
        build_cache(whole.model_copy(update={"keep_views": 2, "num_views": 3}))


def test_a_run_must_fit_a_rolling_cache(rolled: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"sees every view once.*at most 4 epochs.*found 9"):
        train_student(train_recipe(rolled, tmp_path / "run", 9))
    for choice in (FusionChoice(clip_view=0), FusionChoice(clip_scale="match")):
        with pytest.raises(RecipeError, match=r"is dropped \(fusion\.clip_\w+: .*or use a cache that keeps all"):
            following.check_rolling(TeacherCache.open(rolled), choice, 4, 4)


def test_without_a_student_the_builder_waits_and_says_so(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Stopped):
        build_cache(build_recipe(root, tmp_path / "rolling.zarr", max_minutes=0.1))
    assert "2 views are kept, and no student follows the build: waiting for `train-student --follow`" in (
        capsys.readouterr().err
    )
    assert views_there(tmp_path / "rolling.zarr") == {0, 1}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"views_at_once": 3}, "more views are built together than are kept"),
        ({"keep_views": None, "lease_minutes": 5.0}, "Give --keep-views"),
        ({"keep_views": 0}, "keep_views"),
    ],
)
def test_settings_that_do_not_fit(root: Path, tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises((RecipeError, ValidationError), match=problem):
        build_recipe(root, tmp_path / "x.zarr", **changes)
