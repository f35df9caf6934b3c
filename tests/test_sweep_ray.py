"""Sweeps on a Ray cluster of two nodes: the same table and weights, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cache_tools.errors import CacheError, MismatchError, NotFoundError, RecipeError, StorageError
from tests import tiny_run
from tests.ray_nodes import ROOT, SETTINGS, Cluster, cluster
from tests.s3_server import new_bucket
from train.ray_worker import KnownCache, Share, _found_here, _train
from train.sweep_ray import OnRay
from train.sweep_recipe import SweepRecipe
from train.sweep_run import SweepResult, run_sweep

pytest.importorskip("ray.tune", reason="needs Ray (the ray extra)")
FIGURES = ("trial", "status", "error", "top1", "top5", "nll", "ece", "best_epoch", "epochs_done")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, server: str) -> Iterator[Cluster]:
    """Two nodes, whose environment points to an S3 server."""
    with pytest.MonkeyPatch.context() as patch, cluster(tmp_path_factory.mktemp("nodes")) as made:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pictures = tiny_run.write_pictures(tmp_path_factory.mktemp("pictures"))
    return tiny_run.write_cache(tmp_path_factory.mktemp("cache") / "tiny.zarr", pictures)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the nodes have; sums depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sweep(cache: Path | str, epochs: int = 2, **changes: Any) -> SweepRecipe:
    base = tiny_run.recipe(cache, Path("unused"), epochs=epochs).model_dump(mode="json")
    data: dict[str, Any] = {"name": "tiny", "base": base, "students": ("resnet8", "wrn_16_1"), "losses": ("kd", "ce")}
    return SweepRecipe.model_validate(data | changes)


def on_ray(recipe: SweepRecipe, folder: Path, nodes: Cluster, **options: Any) -> SweepResult:
    with OnRay(folder, nodes.address, threads=1, **options) as engine:
        return run_sweep(recipe, folder, engine=engine)


def same(one: SweepResult, other: SweepResult) -> None:
    assert one.trials.select(FIGURES).equals(other.trials.select(FIGURES))
    for ours, theirs in zip(one.trials["folder"], other.trials["folder"], strict=True):
        if (Path(ours) / "result.json").exists():
            first, second = (load_file(Path(folder) / "last.safetensors") for folder in (ours, theirs))
            assert all(torch.equal(first[name], second[name]) for name in first)


def shares_of(folder: Path) -> int:
    """Shares that printed something: each has a log of its own."""
    return len(list((folder / "ray").glob("share-*.log")))


def test_the_table_and_the_weights_are_those_of_this_machine(nodes: Cluster, cache: Path, tmp_path: Path) -> None:
    """One that diverges fails alone on the way; names and folders that are relative mean what they mean here."""
    trials = ({"lr": 0.05}, {"student": "wrn_16_1"}, {"lr": 1e30}, {"loss": "ce"})
    recipe = sweep(cache, students=(), losses=(), trials=trials)
    said: list[str] = []
    there = on_ray(recipe, tmp_path / "ray", nodes, say=said.append)
    assert said == ["Ray: 2 nodes, 2 CPUs, 0 GPUs"]
    assert there.trials["status"].to_list() == ["finished", "finished", "failed", "finished"]
    assert "diverged" in there.trials["error"][2]
    assert shares_of(tmp_path / "ray") == 2
    same(there, run_sweep(recipe, tmp_path / "here"))
    again = on_ray(recipe, tmp_path / "ray", nodes)  # nothing is left to do
    same(again, there)


def test_a_killed_worker_is_started_again(nodes: Cluster, cache: Path, tmp_path: Path) -> None:
    recipe = sweep(cache, epochs=6, losses=())

    def kill() -> bool:
        """One worker, in the middle: trials have states, none has a result."""
        workers = [pid for node in (0, 1) for pid in nodes.workers(node)]
        if not workers or not list(tmp_path.glob("ray/trials/*/state.pt")):
            return False
        os.kill(workers[0], signal.SIGKILL)
        return True

    with _meanwhile(kill) as killed:
        there = on_ray(recipe, tmp_path / "ray", nodes)
    assert killed.is_set()
    same(there, run_sweep(recipe, tmp_path / "here"))


def test_each_node_stages_a_remote_cache_once(nodes: Cluster, cache: Path, tmp_path: Path) -> None:
    from cache_tools.place import LocalPlace, open_place
    from cache_tools.transfer import copy_cache

    url = f"s3://{new_bucket()}/caches/tiny.zarr"
    copy_cache(LocalPlace(cache), open_place(url))
    recipe = sweep(url, losses=(), seeds=2)
    os.environ["TEACHER_CACHE_HOME"], before = str(tmp_path / "home"), os.environ.get("TEACHER_CACHE_HOME")
    try:
        there = on_ray(recipe, tmp_path / "ray", nodes)
        here = run_sweep(sweep(cache, losses=(), seeds=2), tmp_path / "here")
    finally:
        os.environ.pop("TEACHER_CACHE_HOME") if before is None else os.environ.update(TEACHER_CACHE_HOME=before)
    same(there, here)
    for home in nodes.homes:
        assert len(list(home.glob("tiny-*.zarr"))) == 1, "a mirror on each node"
    assert shares_of(tmp_path / "ray") == 2


def test_a_trial_whose_worker_always_dies_is_a_failed_one(nodes: Cluster, cache: Path, tmp_path: Path) -> None:
    killed: set[int] = set()

    def kill() -> bool:
        """Whoever has claimed the trial's folder dies."""
        if (tmp_path / "ray/trials/resnet8-s0/.lock").exists():
            for pid in {*nodes.workers(0), *nodes.workers(1)} - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        return False

    with _meanwhile(kill):
        result = on_ray(sweep(cache, epochs=50, students=("resnet8",), losses=()), tmp_path / "ray", nodes)
    assert result.trials["status"].to_list() == ["failed"]
    assert result.trials["error"][0].startswith("its worker died twice: ")
    assert "None" not in result.trials["error"][0]
    assert len(killed) >= 2
    assert result.trials["error"][0] in (tmp_path / "ray" / "report.html").read_text()


def test_an_error_of_all_trials_is_told_as_it_is(nodes: Cluster, tmp_path: Path) -> None:
    """Images that have changed since the cache was built: the worker finds out."""
    pictures = tiny_run.write_pictures(tmp_path / "pictures")
    drifted = tiny_run.write_cache(tmp_path / "drifted.zarr", pictures, drifted=True)
    with pytest.raises(CacheError) as local:
        run_sweep(sweep(drifted), tmp_path / "here")
    with pytest.raises(type(local.value)) as far:
        on_ray(sweep(drifted), tmp_path / "ray", nodes)
    assert str(far.value) == str(local.value)


def test_a_lost_node_leaves_its_trials_to_the_other(nodes: Cluster, cache: Path, tmp_path: Path) -> None:
    recipe = sweep(cache, epochs=6, losses=())

    def kill() -> bool:
        if not nodes.workers(1) or not list(tmp_path.glob("ray/trials/*/state.pt")):
            return False
        nodes.kill(1)
        return True

    with _meanwhile(kill) as killed:
        there = on_ray(recipe, tmp_path / "ray", nodes)
    assert killed.is_set()
    same(there, run_sweep(recipe, tmp_path / "here"))


def test_no_cluster_is_one_error(cache: Path, tmp_path: Path) -> None:
    with OnRay(tmp_path, "127.0.0.2:9", threads=1) as engine, pytest.raises(StorageError, match="no Ray cluster"):
        run_sweep(sweep(cache), tmp_path, engine=engine)
    with pytest.raises(RecipeError, match="Ray's client"):
        OnRay(tmp_path, "ray://127.0.0.1:10001")


def test_a_node_that_sees_another_folder_refuses(cache: Path, tmp_path: Path) -> None:
    share = Share(
        trials=(), contest=None, threads=1, folder=tmp_path, token="ours", log="log", working_folder=tmp_path,
        host="here", caches={},
    )  # fmt: skip
    for token in (None, "another sweep's"):
        if token is not None:
            (tmp_path / "token").write_text(token)
        with pytest.raises(StorageError, match="do not see the folder"):
            _train(share)


def test_a_node_takes_its_own_copy_only_if_it_is_the_same_cache(cache: Path, tmp_path: Path) -> None:
    from cache_tools.store import read_manifest

    fingerprint = read_manifest(cache).fingerprint
    elsewhere = tmp_path / "nowhere.zarr"
    assert _found_here("tiny", KnownCache(path=cache, fingerprint=fingerprint)) == str(cache)
    assert _found_here(str(cache), KnownCache(path=elsewhere, fingerprint=fingerprint)) == str(cache)
    remote = KnownCache(path=elsewhere, fingerprint=fingerprint, url="s3://group/tiny.zarr")
    assert _found_here("tiny", remote) == "s3://group/tiny.zarr"
    with pytest.raises(NotFoundError, match="does not have the cache"):
        _found_here(str(cache), KnownCache(path=elsewhere, fingerprint="0" * 64))


def test_other_versions_on_a_node_are_named(nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node is real; what differs is what this side takes itself for."""
    code = (
        "import train.ray_driver as driver\n"
        "driver.versions = lambda: {'teacher-cache': '0.0.0', 'torch': '0', 'ray': '0'}\n"
        "driver.main()"
    )
    monkeypatch.setattr("train.ray_link._DRIVER", code)
    with OnRay(tmp_path, nodes.address, threads=1) as engine, pytest.raises(MismatchError, match="another version"):
        engine([], None)


def test_without_ray_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util as util\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name.startswith('ray') else found(name, *more)\n"
        "from train.sweep_cli import main\n"
        "sys.argv = ['sweep-students', '--engine', 'ray', '--out', sys.argv[1]]\n"
        "main()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'teacher-cache[ray]'" in done.stderr
    assert not (tmp_path / "out").exists()


class _meanwhile:
    """Tries something again and again beside the test until it has worked."""

    def __init__(self, work: Callable[[], bool]) -> None:
        self._work, self.done, self._stop = work, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> threading.Event:
        self._thread.start()
        return self.done

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._work():
                self.done.set()
                return
            time.sleep(0.02)
