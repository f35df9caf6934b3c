"""`train-student --follow`: a run that starts before its cache is complete ends like one that starts afterwards."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace

import pytest

from cache_tools.errors import IncompleteError, RecipeError
from cache_tools.format.commits import BlockId
from cache_tools.reader import TeacherCache
from tests.support import tiny_run
from train.feed import following
from train.feed.following import Follower, wait_for_cache
from train.run import train_student

EPOCHS = 4  # of three views


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return tiny_run.write_pictures(tmp_path / "pictures")


@pytest.fixture
def complete(tmp_path: Path, pictures: Path) -> Path:
    return tiny_run.write_cache(tmp_path / "complete.zarr", pictures)


@pytest.fixture(autouse=True)
def short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "FIRST_LOOK_S", 0.02)
    monkeypatch.setattr(following, "LONGEST_LOOK_S", 0.05)


class SlowBuilder(threading.Thread):
    """Makes a copy of a cache appear block by block, each commit after its chunks, as a builder does."""

    def __init__(self, complete: Path, path: Path, pause_s: float) -> None:
        super().__init__()
        self._complete, self._path, self._pause_s = complete, path, pause_s
        self.may_begin = threading.Event()
        self.order = [BlockId(*index) for index in self.blocks(complete)]
        shutil.copytree(complete, path)
        for block in self.order:
            (path / block.commit_key).unlink()

    @staticmethod
    def blocks(path: Path) -> Iterator[tuple[int, int]]:
        manifest = TeacherCache.open(path).manifest
        return ((view, block) for view in range(manifest.num_views) for block in range(manifest.num_blocks))

    def commit(self, block: BlockId) -> None:
        target = self._path / block.commit_key
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self._complete / block.commit_key, target.with_suffix(".new"))
        target.with_suffix(".new").rename(target)

    def run(self) -> None:
        self.may_begin.wait(timeout=120)
        for block in self.order:
            time.sleep(self._pause_s)
            self.commit(block)


def test_a_run_that_follows_equals_one_that_came_later(
    complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder, told = SlowBuilder(complete, tmp_path / "growing.zarr", 0.05), list[str]()

    def tell(text: str) -> None:
        told.append(text)
        builder.may_begin.set()

    monkeypatch.setattr(following, "_print", tell)
    with pytest.raises(IncompleteError):
        train_student(tiny_run.recipe(tmp_path / "growing.zarr", tmp_path / "early", epochs=EPOCHS))
    builder.start()
    train_student(tiny_run.recipe(tmp_path / "growing.zarr", tmp_path / "follows", epochs=EPOCHS, follow=True))
    builder.join()
    train_student(tiny_run.recipe(complete, tmp_path / "later", epochs=EPOCHS))
    tiny_run.same_runs(tmp_path / "follows", tmp_path / "later")
    assert told[0].startswith("waiting for view 0 of growing.zarr: 0 of 4 blocks are built, none since the run began")
    assert told[0].endswith("ago (is `build-cache` running?)")
    assert told[1].startswith("view 0 is complete after a wait of ")


def test_a_scale_that_is_measured_waits_for_its_view(tmp_path: Path, pictures: Path) -> None:
    complete = tiny_run.write_cache(tmp_path / "components.zarr", pictures, store="components")
    builder = SlowBuilder(complete, tmp_path / "growing.zarr", 0.02)
    builder.may_begin.set()
    builder.start()
    for cache, name, follow in ((tmp_path / "growing.zarr", "follows", True), (complete, "later", False)):
        own = {"fusion": {"clip_scale": "match"}, "follow": follow}
        train_student(tiny_run.recipe(cache, tmp_path / name, epochs=1, **own))
    builder.join()
    tiny_run.same_runs(tmp_path / "follows", tmp_path / "later")


def test_an_epoch_needs_only_its_own_view(complete: Path, tmp_path: Path) -> None:
    builder = SlowBuilder(complete, tmp_path / "growing.zarr", 0.0)
    for block in builder.order:
        if block.view == 0:
            builder.commit(block)
    result = train_student(tiny_run.recipe(tmp_path / "growing.zarr", tmp_path / "run", epochs=1, follow=True))
    assert result.epochs == 1


def test_a_killed_run_goes_on_and_still_waits(complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = SlowBuilder(complete, tmp_path / "growing.zarr", 0.0)
    for block in builder.order:
        if block.view == 0:
            builder.commit(block)
    recipe = tiny_run.recipe(tmp_path / "growing.zarr", tmp_path / "run", epochs=EPOCHS, follow=True)

    def interrupt(self: Follower, view: int, blocks: object) -> str | None:
        if view == 1:
            raise KeyboardInterrupt
        return None

    with monkeypatch.context() as patch:
        patch.setattr(Follower, "_missing", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_student(recipe)
    builder.may_begin.set()
    builder.start()
    train_student(recipe)
    builder.join()
    train_student(tiny_run.recipe(complete, tmp_path / "later", epochs=EPOCHS))
    tiny_run.same_runs(tmp_path / "run", tmp_path / "later")


def test_waiting_tells_the_rate_and_ends_when_asked(
    complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 100_000, 10))
    builder = SlowBuilder(complete, tmp_path / "growing.zarr", 0.0)
    follower = Follower(TeacherCache.open(tmp_path / "growing.zarr"))
    builder.commit(BlockId(0, 0))
    builder.commit(BlockId(0, 2))
    monkeypatch.setattr(following, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    follower._begun_s = -30.0  # two blocks in 30 s and the 10 s until the clock is read: four blocks take 80 s
    threading.Timer(0.2, follower.stop).start()
    with pytest.raises(CancelledError):
        follower.wait(0)
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "waiting for view 0 of growing.zarr: 2 of 4 blocks are built, a view takes about 1 min 20 s"


def test_a_cache_that_is_not_there_is_waited_for(
    complete: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "later.zarr"
    threading.Timer(0.2, complete.rename, [path]).start()
    assert wait_for_cache(path, lambda: TeacherCache.open(path)).is_complete
    assert capsys.readouterr().err.startswith(f"waiting for a builder to create the cache {path}: no cache")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"loss": {"kind": "ce"}}, "no cache to follow"), ({"label_fraction": 0.5}, "complete cache for the others")],
)
def test_what_cannot_follow_is_refused(
    complete: Path, tmp_path: Path, changes: dict[str, object], problem: str
) -> None:
    with pytest.raises(RecipeError, match=problem):
        tiny_run.recipe(complete, tmp_path, follow=True, **changes)


def test_following_is_no_part_of_the_result(complete: Path, tmp_path: Path) -> None:
    assert tiny_run.recipe(complete, tmp_path, follow=True).values() == tiny_run.recipe(complete, tmp_path).values()
