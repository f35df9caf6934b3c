"""`train-student --stage-budget`: the same student from a cache in a store, and never more of it on the disk."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_tools.config import dump_yaml
from cache_tools.errors import RecipeError
from cache_tools.home import registry
from cache_tools.home.housekeeping import PruneRules, prune
from cache_tools.places import LocalPlace
from cache_tools.places.claims import Claims
from cache_tools.reader import TeacherCache
from tests.support import tiny_run, torchrun
from tests.support.preloaded import Preloaded, run_module
from tests.support.s3_server import new_bucket, upload
from train.run import train_student
from train.runs.stored import open_run
from train.sweep.recipe import SweepRecipe
from train.sweep.run import run_sweep

EPOCHS, VIEWS = 4, 3


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return tiny_run.write_cache(tmp_path_factory.mktemp("local") / "tiny.zarr", pictures, num_views=VIEWS)


@pytest.fixture(scope="module")
def url(server: str, local: Path) -> str:
    url = f"s3://{new_bucket()}/caches/tiny.zarr"
    upload(local, url)
    return url


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, local: Path) -> dict[int | None, Path]:
    """Runs from the local cache, by their shuffle window."""
    root = tmp_path_factory.mktemp("references")
    for window in (None, 1):
        train_student(tiny_run.recipe(local, root / str(window), epochs=EPOCHS, shuffle_window=window))
    return {window: root / str(window) for window in (None, 1)}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache home."""
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def budget(url: str, home: Path) -> int:
    """The smallest budget of the cache, as the error names it."""
    with pytest.raises(RecipeError, match=r"no room for 2 views: one in use, and the next") as caught:
        TeacherCache.open(url, stage_budget=1000)
    match = re.search(r"--stage-budget ([0-9]+)B or more", str(caught.value))
    assert match
    assert not (home / "staged").exists()
    return int(match[1])


def stage_files(home: Path) -> dict[tuple[str, int, int], int]:
    """The size of every file in the stages of a home, by its path, inode and time of change."""
    sizes = {}
    for folder, _, names in os.walk(home / "staged"):
        for name in names if ".zarr/" in f"{folder}/" else ():
            with suppress(OSError):  # removed meanwhile
                stat = os.lstat(path := os.path.join(folder, name))
                sizes[path, stat.st_ino, stat.st_ctime_ns] = stat.st_size
    return sizes


def num_bytes(home: Path) -> int:
    """The size of the stages of a home, without files that came or went while they were listed.

    A walk takes time: it may meet an old view in the first folder, and the view that replaced it in the second. Files
    that two walks meet were all there when the second began.
    """
    before = stage_files(home)
    return sum(size for file, size in stage_files(home).items() if before.get(file) == size)


class Watch:
    """The most bytes that were seen in the stages of a home, and the views that were there."""

    def __init__(self, home: Path) -> None:
        self.most, self.views, self._home, self._stop = 0, set[str](), home, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._stop.wait(0.001):
            self.most = max(self.most, num_bytes(self._home))
            for stage in (self._home / "staged").glob("*/tiny*.zarr"):
                with suppress(OSError):  # not yet, or no longer
                    names = os.listdir(stage / "commits")
                    self.views |= {name.split(".")[1] for name in names if name.startswith("c.")}


@contextmanager
def watched(home: Path) -> Iterator[Watch]:
    watch = Watch(home)
    watch._thread.start()
    try:
        yield watch
    finally:
        watch._stop.set()
        watch._thread.join()


def command(url: str, out: Path, budget: int, *options: str) -> list[str]:
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = tiny_run.recipe(url, out, epochs=EPOCHS).model_dump_json(exclude={"cache", "out", "fusion"})
    file = out.parent / "recipe.yaml"
    file.write_text(recipe)  # JSON is valid YAML
    return ["train.cli", str(file), "--cache", url, "--out", str(out), "--stage-budget", f"{budget}B", *options]


@pytest.mark.parametrize("window", [None, 1])
def test_the_same_student_within_the_smallest_budget(
    local: Path,
    references: dict[int | None, Path],
    url: str,
    home: Path,
    budget: int,
    tmp_path: Path,
    window: int | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = {"epochs": EPOCHS, "shuffle_window": window}
    with watched(home) as watch:
        train_student(tiny_run.recipe(url, tmp_path / "staged", **own, stage_budget=budget))
    tiny_run.same_runs(references[window], tmp_path / "staged")
    assert watch.views == {str(view) for view in range(VIEWS)}
    assert budget / 2 < watch.most <= budget
    assert num_bytes(home) == 0
    assert not (home / "staged").exists(), "the last run removes the stage"
    assert (
        len(re.findall(r"^stage: views come to .* at most .* for 3 views of tiny$", capsys.readouterr().err, re.M)) == 1
    )
    assert open_run(tmp_path / "staged")[0].cache == url
    if window is not None:
        return
    with pytest.raises(RecipeError, match=r"no room"):
        train_student(tiny_run.recipe(url, tmp_path / "less", **own, stage_budget=budget - 1))
    with pytest.raises(RecipeError, match=r"for a cache in an object store"):
        tiny_run.recipe(local, tmp_path / "less", stage_budget=budget)


def test_a_killed_run_goes_on(
    references: dict[int | None, Path], url: str, home: Path, budget: int, tmp_path: Path
) -> None:
    """It leaves its stage behind, which the next one goes on with, or `prune` removes."""
    words = command(url, tmp_path / "run", budget)
    with watched(home) as watch:
        killed = Preloaded(run_module, *words)
        end_s = time.monotonic() + 200
        while not (tmp_path / "run" / "state.pt").exists():
            assert time.monotonic() < end_s
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=60)
        assert killed.returncode == -signal.SIGKILL
        assert num_bytes(home) > 0
        left = prune(PruneRules(incomplete=True), dry_run=True).leftovers
        assert [path.parent for path in left] == [home / "staged"]
        done = Preloaded(run_module, *words)
        _, err = done.communicate(timeout=200)
        assert done.returncode == 0, err
    tiny_run.same_runs(references[None], tmp_path / "run")
    assert 0 < watch.most <= budget
    assert not (home / "staged").exists()


def test_runs_share_a_stage(
    references: dict[int | None, Path], url: str, home: Path, budget: int, tmp_path: Path
) -> None:
    """Three at once, in the room of two views: each needs one at a time, and waits for the others."""
    windows = {"a": None, "b": 1, "c": 1}
    with watched(home) as watch:
        runs = {
            name: Preloaded(
                run_module,
                *command(url, tmp_path / name / "run", budget),
                *([] if window is None else ["--shuffle-window", str(window)]),
            )
            for name, window in windows.items()
        }
        errors = {name: run.communicate(timeout=300)[1] for name, run in runs.items()}
    assert {run.returncode for run in runs.values()} == {0}, errors
    for name, window in windows.items():
        tiny_run.same_runs(references[window], tmp_path / name / "run")
    assert 0 < watch.most <= budget
    assert not (home / "staged").exists()


def test_a_reader_keeps_its_view_and_gets_every_row(local: Path, url: str, home: Path, budget: int) -> None:
    whole = TeacherCache.open(local)
    one, other = (TeacherCache.open(url, stage_budget=budget) for _ in range(2))
    for step in range(2 * VIEWS):
        view, beside = step % VIEWS, (3 * step + 1) % VIEWS
        part = one.load_view(view, blocks=[0])
        other.load_view(beside)
        again = one.load_view(view, blocks=[1])
        rows = whole.load_view(view, blocks=[0, 1])
        for name, values in rows.arrays.items():
            assert torch.cat([part.arrays[name], again.arrays[name]]).equal(values)
        assert num_bytes(home) <= budget
    assert prune(PruneRules(incomplete=True), dry_run=True).leftovers == {}, "it is in use"
    one.close()
    assert num_bytes(home) > 0
    other.close()
    assert not (home / "staged").exists()


def test_whoever_waits_for_room_gives_up_the_view_that_it_has_prepared(url: str, home: Path, budget: int) -> None:
    """Two readers have prepared a view each, and one of them needs a third."""
    one, other = (TeacherCache.open(url, stage_budget=budget) for _ in range(2))
    with closing(one), closing(other):
        for cache, read, prepared in ((one, 0, 1), (other, 2, 0)):
            cache.load_view(read)
            cache.prepare_view(prepared)
            wait_until(lambda view=prepared: view in registry.read_complete_views(cache.path, cache.manifest))  # noqa: B023
        assert one.load_view(2).view == 2
        assert num_bytes(home) <= budget


def test_what_a_killed_process_left_of_a_block_goes_before_it_is_copied_again(
    local: Path, url: str, home: Path, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise old and new files are there at the same time, with one room for both."""
    most, put = 0, LocalPlace.put

    def measured(place: LocalPlace, key: str, data: bytes, **own: bool) -> bool:
        nonlocal most
        if "/c." in key:  # of the stage, not a claim beside it
            most = max(most, num_bytes(home) + len(data))
        return put(place, key, data, **own)

    one, other = (TeacherCache.open(url, stage_budget=budget) for _ in range(2))
    with closing(one), closing(other):
        for view in (0, 1):
            one.load_view(view)
        one.load_view(0)
        folder = one.path
        for block in range(3):
            (folder / "commits" / f"c.1.{block}.0").unlink()
        for array in ("fused_features", "fused_logits"):
            file = folder / array / "c.1.2.0"
            file.rename(file.with_name(f"{file.name}.{uuid.uuid4().hex}.partial"))
        monkeypatch.setattr(LocalPlace, "put", measured)
        loaded = other.load_view(1)
        whole = TeacherCache.open(local).load_view(1)
        for name, values in whole.arrays.items():
            assert loaded.arrays[name].equal(values)
        assert num_bytes(home) <= budget
        assert 0 < most <= budget
        assert not [*folder.rglob("*.partial")]


def test_half_a_copy_of_the_metadata_goes_when_the_next_process_opens_the_stage(
    url: str, home: Path, budget: int
) -> None:
    with closing(TeacherCache.open(url, stage_budget=budget)) as cache:
        folder = cache.path.parent
    left = folder / f".{cache.path.name}.{uuid.uuid4().hex}.partial"
    (left / "sample_keys").mkdir(parents=True)
    (left / "sample_keys" / f"c.0.0.{uuid.uuid4().hex}.partial").write_bytes(b"half")
    with closing(TeacherCache.open(url, stage_budget=budget)) as cache:
        assert not left.exists()
        assert cache.load_view(0).view == 0
    assert not (home / "staged").exists()


def test_of_two_that_close_at_once_one_removes_the_stage(
    url: str, home: Path, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is still giving up its claims when the second looks for others."""
    one, other = (TeacherCache.open(url, stage_budget=budget) for _ in range(2))
    one.load_view(0)
    other.load_view(0)
    end, is_inside, may_end = Claims.__exit__, threading.Event(), threading.Event()

    def slow_end(claims: Claims, *error: Any) -> None:
        if not is_inside.is_set():
            is_inside.set()
            assert may_end.wait(60)
        end(claims, *error)

    monkeypatch.setattr(Claims, "__exit__", slow_end)
    first = threading.Thread(target=one.close)
    first.start()
    assert is_inside.wait(60)
    other.close()
    may_end.set()
    first.join()
    assert not (home / "staged").exists()


def wait_until(is_so: Callable[[], bool], seconds: float = 120.0) -> None:
    end_s = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_sweep_within_a_budget(local: Path, url: str, home: Path, budget: int, tmp_path: Path) -> None:
    for name, cache, own in (("local", str(local), {}), ("staged", url, {"stage_budget": budget})):
        base = tiny_run.recipe(cache, tmp_path / "unused", epochs=2, **own).model_dump(mode="json", exclude={"out"})
        with watched(home) as watch:
            run_sweep(SweepRecipe(name="tiny", base=base, seeds=2), tmp_path / name)
        assert 0 <= watch.most <= budget
    trials = sorted(path.name for path in (tmp_path / "local" / "trials").iterdir())
    assert len(trials) == 2
    for trial in trials:
        tiny_run.same_runs(tmp_path / "local" / "trials" / trial, tmp_path / "staged" / "trials" / trial)
    assert not (home / "staged").exists()


@pytest.mark.parametrize("window", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_ranks_of_torchrun_share_a_stage(
    local: Path, url: str, home: Path, budget: int, tmp_path: Path, window: int | None
) -> None:
    own = {"epochs": EPOCHS, "batch_size": 10, "shuffle_window": window}
    for name, cache, more in (("local", str(local), {}), ("staged", url, {"stage_budget": budget})):
        file = tmp_path / f"{name}.yaml"
        file.write_text(dump_yaml(tiny_run.recipe(cache, tmp_path / name, **own, **more)))
        with watched(home) as watch:
            code, _, err = torchrun.run("train.cli", file, "--cache", cache)
        assert code == 0, err
        assert watch.most <= budget
    tiny_run.same_runs(tmp_path / "local", tmp_path / "staged")
    assert watch.views == {str(view) for view in range(VIEWS)}
    assert err.count("stage: views come to") == 1, "the first rank says it"
    assert not (home / "staged").exists(), "the last rank removes the stage"


def test_the_view_of_clip_needs_room_for_a_third(server: str, pictures: Path, home: Path, tmp_path: Path) -> None:
    """With the smallest budget that the error names, the students are those of a local cache."""
    local = tiny_run.write_cache(tmp_path / "parts.zarr", pictures, num_views=VIEWS + 1, store="components")
    url = f"s3://{new_bucket()}/caches/tiny.zarr"
    upload(local, url)
    own = {"epochs": VIEWS + 2, "fusion": {"clip_view": 2}}
    train_student(tiny_run.recipe(local, tmp_path / "local", **own))
    with pytest.raises(RecipeError, match=r"no room for 2 views") as caught:
        TeacherCache.open(url, stage_budget=1000)
    two = int(re.search(r"--stage-budget ([0-9]+)B or more", str(caught.value))[1])  # type: ignore[index]
    expected = r"no room for 3 views: one in use, and the next, and the one that CLIP's targets come from"
    with pytest.raises(RecipeError, match=expected) as caught:
        train_student(tiny_run.recipe(url, tmp_path / "staged", **own, stage_budget=two))
    assert not (home / "staged").exists()
    three = int(re.search(r"--stage-budget ([0-9]+)B or more", str(caught.value))[1])  # type: ignore[index]
    with watched(home) as watch:
        train_student(tiny_run.recipe(url, tmp_path / "staged", **own, stage_budget=three))
    tiny_run.same_runs(tmp_path / "local", tmp_path / "staged")
    assert two < watch.most <= three
    assert not (home / "staged").exists()


def test_a_run_that_follows_a_build_is_refused_a_budget(url: str, budget: int, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a run that follows a build keeps the views that it has read") as caught:
        tiny_run.recipe(url, tmp_path / "run", follow=True, stage_budget=budget)
    assert f"follow, stage_budget: {budget}" in str(caught.value)
    assert "Leave out one of them" in str(caught.value)
