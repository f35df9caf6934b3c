"""Sweeps on a Ray cluster of two nodes: the same table and weights as on one machine, even if workers or nodes die."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cache_tools.errors import CacheError, DeviceError, MismatchError, NotFoundError, RecipeError, StorageError
from cache_tools.places import LocalPlace, open_place
from cache_tools.places.transfer import copy_cache
from cache_tools.reader import TeacherCache
from tests.support import tiny_run
from tests.support.flaky_proxy import FlakyProxy, flaky_proxy
from tests.support.preloaded import Preloaded, run_main
from tests.support.ray_nodes import ROOT, SETTINGS, Cluster, cluster, meanwhile, processes, suspend_half_way
from tests.support.s3_server import has_loopback, new_bucket
from train.sweep.ray.engine import RayEngine
from train.sweep.ray.worker import Share, SourceCache, _train, find_cache
from train.sweep.recipe import SweepRecipe
from train.sweep.run import SweepResult, run_sweep

FIGURES = ("trial", "status", "error", "top1", "top5", "nll", "ece", "best_epoch", "epochs_done")


@pytest.fixture(scope="module", autouse=True)
def needs_ray() -> None:
    pytest.importorskip("ray.tune", reason="needs Ray (the ray extra)")


@pytest.fixture(scope="module")
def proxy(server: str) -> Iterator[FlakyProxy]:
    """A proxy in front of an S3 server that records requests and fails none."""
    with flaky_proxy() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, proxy: FlakyProxy) -> Iterator[Cluster]:
    """Two nodes that reach the S3 server through the proxy."""
    with pytest.MonkeyPatch.context() as patch, cluster(tmp_path_factory.mktemp("nodes")) as made:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pictures = tiny_run.write_pictures(tmp_path_factory.mktemp("pictures"))
    return tiny_run.write_cache(tmp_path_factory.mktemp("cache") / "tiny.zarr", pictures)


@pytest.fixture(scope="module")
def undisturbed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """The result of `long_sweep` on this machine."""
    return run_sweep(long_sweep(cache), tmp_path_factory.mktemp("undisturbed"))


def sweep(cache: Path | str, epochs: int = 2, **changes: Any) -> SweepRecipe:
    base = tiny_run.recipe(cache, Path("unused"), epochs=epochs).model_dump(mode="json")
    data: dict[str, Any] = {"name": "tiny", "base": base, "students": ("resnet8", "wrn_16_1"), "losses": ("kd", "ce")}
    return SweepRecipe.model_validate(data | changes)


def long_sweep(cache: Path) -> SweepRecipe:
    """Two trials, long enough to be suspended half-way."""
    base = tiny_run.recipe(cache, Path("unused"), epochs=40, evaluate_every=40, loggers=()).model_dump(mode="json")
    return sweep(cache, base=base, losses=())


def on_ray(recipe: SweepRecipe, folder: Path, nodes: Cluster, **options: Any) -> SweepResult:
    with RayEngine(folder, nodes.address, threads=1, **options) as engine:
        return run_sweep(recipe, folder, engine=engine)


def same(one: SweepResult, other: SweepResult) -> None:
    assert one.trials.select(FIGURES).equals(other.trials.select(FIGURES))
    for ours, theirs in zip(one.trials["folder"], other.trials["folder"], strict=True):
        if (Path(ours) / "result.json").exists():
            first, second = (load_file(Path(folder) / "last.safetensors") for folder in (ours, theirs))
            assert all(torch.equal(first[name], second[name]) for name in first)


def shares_of(folder: Path) -> int:
    """Number of shares that were trained: each has a log."""
    return len(list((folder / "ray").glob("share-*.log")))


def test_table_and_weights_equal_those_of_one_machine(nodes: Cluster, cache: Path, tmp_path: Path) -> None:
    """Also with a trial that diverges, and with relative names and folders."""
    trials = ({"lr": 0.05}, {"student": "wrn_16_1"}, {"lr": 1e30}, {"loss": "ce"})
    recipe = sweep(cache, students=(), losses=(), trials=trials)
    lines: list[str] = []
    on_cluster = on_ray(recipe, tmp_path / "ray", nodes, say=lines.append)
    assert lines == ["Ray: 2 nodes, 2 CPUs, 0 GPUs"]
    assert on_cluster.trials["status"].to_list() == ["finished", "finished", "failed", "finished"]
    assert "diverged" in on_cluster.trials["error"][2]
    assert shares_of(tmp_path / "ray") == 2
    same(on_cluster, run_sweep(recipe, tmp_path / "local"))
    again = on_ray(recipe, tmp_path / "ray", nodes)  # trains nothing
    same(again, on_cluster)


@pytest.mark.slow
def test_a_killed_worker_is_started_again(
    nodes: Cluster, cache: Path, undisturbed: SweepResult, tmp_path: Path
) -> None:
    def kill() -> bool:
        pid = suspend_half_way(tmp_path / "ray/trials", [*nodes.workers(0), *nodes.workers(1)])
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        return pid is not None

    with meanwhile(kill) as killed:
        on_cluster = on_ray(long_sweep(cache), tmp_path / "ray", nodes)
    assert killed.is_set()
    same(on_cluster, undisturbed)


@pytest.mark.slow
def test_each_node_stages_a_remote_cache_once(
    nodes: Cluster, proxy: FlakyProxy, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more shares than nodes, and with a cache home of this process that no node uses."""
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    url = f"s3://{new_bucket()}/caches/tiny.zarr"
    copy_cache(LocalPlace(cache), open_place(url))
    proxy.forget()
    changes: dict[str, Any] = {"students": ("resnet8",), "losses": (), "seeds": 3}
    on_cluster = on_ray(sweep(url, **changes), tmp_path / "ray", nodes, workers=3)
    chunks = [path for path in proxy.paths("GET") if "/fused_logits/c." in path]
    assert len(chunks) == 2 * len(set(chunks)) == 2 * 2 * 4, "each node reads four blocks of each of two views"
    for home in nodes.homes:
        assert len(list(home.glob("tiny-*.zarr"))) == 1, "each node has a mirror"
    assert shares_of(tmp_path / "ray") == 3
    same(on_cluster, run_sweep(sweep(cache, **changes), tmp_path / "local"))


@pytest.mark.slow
def test_a_stage_budget_holds_on_each_node(
    nodes: Cluster, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has room for two of the three views, on each node and for this process."""
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    url = f"s3://{new_bucket()}/caches/tiny.zarr"
    copy_cache(LocalPlace(cache), open_place(url))
    with pytest.raises(RecipeError, match="no room for 2 views") as caught:
        TeacherCache.open(url, stage_budget=1000)
    budget = int(str(caught.value).rpartition("--stage-budget ")[2].partition("B or more")[0])
    changes: dict[str, Any] = {"epochs": 4, "students": ("resnet8",), "losses": (), "seeds": 3}
    recipe = sweep(url, **changes)
    staged = recipe.model_copy(update={"base": {**recipe.base, "stage_budget": budget}})
    on_cluster = on_ray(staged, tmp_path / "ray", nodes, workers=3)
    assert on_cluster.trials["status"].to_list() == ["finished"] * 3
    same(on_cluster, run_sweep(sweep(cache, **changes), tmp_path / "local"))
    logs = [log.read_text() for log in (tmp_path / "ray/ray").glob("share-*.log")]
    assert len(logs) == 3
    assert all("stage tiny, view 2: " in log for log in logs)
    for home in (*nodes.homes, tmp_path / "home"):
        assert not (home / "staged").exists(), "the last process removes the stage"


@pytest.mark.slow
def test_a_name_is_found_in_the_cache_home_of_each_node(
    nodes: Cluster, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node without the folder of this process uses its own copy, or raises an error that names the missing cache."""
    folder = f"tiny-{TeacherCache.open(cache).manifest.fingerprint[:12]}.zarr"
    copy_cache(LocalPlace(cache), LocalPlace(tmp_path / "home" / folder))
    for home in nodes.homes:
        shutil.rmtree(home, ignore_errors=True)
    with path_for_this_process(tmp_path / "home") as private_home:
        monkeypatch.setenv("TEACHER_CACHE_HOME", private_home)
        recipe = sweep("tiny", epochs=1, students=("resnet8",), losses=())
        with pytest.raises(NotFoundError, match=r"does not have the cache.*name it by its URL"):
            on_ray(recipe, tmp_path / "ray", nodes)
        for home in nodes.homes:
            copy_cache(LocalPlace(cache), LocalPlace(home / folder))
        assert on_ray(recipe, tmp_path / "ray", nodes).trials["status"].to_list() == ["finished"]


@pytest.mark.slow
def test_a_sweep_folder_that_nodes_do_not_see(
    nodes: Cluster, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path leads to another folder in each process."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=r"do not see the folder of the sweep.*Choose an --out on a disk"):
        on_ray(sweep(cache), Path("/proc/self/cwd/sweep"), nodes)
    assert not list((tmp_path / "sweep/trials").iterdir())


@pytest.mark.slow
def test_no_node_has_room_for_a_trial(nodes: Cluster, cache: Path, tmp_path: Path) -> None:
    room = r"no node.*1 CPUs, 0 GPUs.*expected 2 CPUs.*OMP_NUM_THREADS"
    with RayEngine(tmp_path, nodes.address, threads=2) as engine, pytest.raises(DeviceError, match=room):
        run_sweep(sweep(cache), tmp_path, engine=engine)
    gpu = tiny_run.recipe(cache, Path("unused"), device="cuda:0").model_dump(mode="json")
    with pytest.raises(DeviceError, match="Ray chooses the GPU"):
        on_ray(sweep(cache, base=gpu), tmp_path / "gpu", nodes)


@pytest.mark.slow
def test_a_trial_whose_worker_always_dies_has_failed(nodes: Cluster, cache: Path, tmp_path: Path) -> None:
    killed: set[int] = set()

    def kill() -> bool:
        """Kill the workers once one has claimed the trial's folder."""
        if (tmp_path / "ray/trials/resnet8-s0/.lock").exists():
            for pid in {*nodes.workers(0), *nodes.workers(1)} - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        return False

    with meanwhile(kill):
        result = on_ray(sweep(cache, epochs=50, students=("resnet8",), losses=()), tmp_path / "ray", nodes)
    assert result.trials["status"].to_list() == ["failed"]
    assert result.trials["error"][0].startswith("its worker died twice: ")
    assert "None" not in result.trials["error"][0]
    assert len(killed) >= 2
    assert result.trials["error"][0] in (tmp_path / "ray" / "report.html").read_text()


@pytest.mark.slow
def test_an_error_that_concerns_all_trials_is_raised_as_it_is(nodes: Cluster, tmp_path: Path) -> None:
    """The worker finds that images have changed since the cache was built."""
    pictures = tiny_run.write_pictures(tmp_path / "pictures")
    drifted = tiny_run.write_cache(tmp_path / "drifted.zarr", pictures, drifted=True)
    with pytest.raises(CacheError) as local:
        run_sweep(sweep(drifted), tmp_path / "local")
    with pytest.raises(type(local.value)) as remote:
        on_ray(sweep(drifted), tmp_path / "ray", nodes)
    assert str(remote.value) == str(local.value)


@pytest.mark.slow
def test_the_other_node_finishes_the_trials_of_a_lost_node(
    nodes: Cluster, cache: Path, undisturbed: SweepResult, tmp_path: Path
) -> None:
    def kill() -> bool:
        """Kill the node that did not start the sweep."""
        found = suspend_half_way(tmp_path / "ray/trials", nodes.workers(1)) is not None
        if found:
            nodes.kill(1)
        return found

    with meanwhile(kill) as killed:
        on_cluster = on_ray(long_sweep(cache), tmp_path / "ray", nodes)
    assert killed.is_set()
    same(on_cluster, undisturbed)


@pytest.mark.medium
def test_no_cluster(cache: Path, tmp_path: Path) -> None:
    with RayEngine(tmp_path, "127.0.0.2:9", threads=1) as engine, pytest.raises(StorageError, match="no Ray cluster"):
        run_sweep(sweep(cache), tmp_path, engine=engine)
    with pytest.raises(RecipeError, match="Ray's client"):
        RayEngine(tmp_path, "ray://127.0.0.1:10001")


def test_a_node_that_sees_another_folder_refuses(cache: Path, tmp_path: Path) -> None:
    share = Share(
        trials=(), halving=None, threads=1, folder=tmp_path, token="ours", log="log", working_folder=tmp_path,
        host="here", caches={},
    )  # fmt: skip
    for token in (None, "another sweep's"):
        if token is not None:
            (tmp_path / "token").write_text(token)
        with pytest.raises(StorageError, match="do not see the folder"):
            _train(share)


def test_a_node_uses_its_own_copy_only_if_it_is_the_same_cache(cache: Path, tmp_path: Path) -> None:
    from cache_tools.store.group import read_manifest

    fingerprint = read_manifest(cache).fingerprint
    elsewhere = tmp_path / "nowhere.zarr"
    assert find_cache("tiny", SourceCache(path=cache, fingerprint=fingerprint)) == str(cache)
    assert find_cache(str(cache), SourceCache(path=elsewhere, fingerprint=fingerprint)) == str(cache)
    remote = SourceCache(path=elsewhere, fingerprint=fingerprint, url="s3://group/tiny.zarr")
    assert find_cache("tiny", remote) == "s3://group/tiny.zarr"
    with pytest.raises(NotFoundError, match="does not have the cache"):
        find_cache(str(cache), SourceCache(path=elsewhere, fingerprint="0" * 64))


def test_other_versions_on_a_node_are_an_error(nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node is real; the driver pretends to have other versions."""
    code = (
        "import train.sweep.ray.cluster as cluster, train.sweep.ray.driver as driver\n"
        "cluster.versions = lambda: {'teacher-cache': '0.0.0', 'torch': '0', 'ray': '0'}\n"
        "driver.main()"
    )
    monkeypatch.setattr("train.sweep.ray.link.command_for", lambda module: [sys.executable, "-c", code])
    with RayEngine(tmp_path, nodes.address, threads=1) as engine, pytest.raises(MismatchError, match="another version"):
        engine([], None)


def sweep_without_ray(out: str) -> None:
    """What `sweep-students --engine ray` does where Ray is not installed."""
    found = importlib.util.find_spec
    hide = pytest.MonkeyPatch()  # to the end of the process
    hide.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name.startswith("ray") else found(name, *more)
    )
    run_main("train.sweep.cli", "--engine", "ray", "--out", out)


@pytest.mark.medium
def test_without_ray_the_command_says_what_to_install(tmp_path: Path) -> None:
    process = Preloaded(sweep_without_ray, str(tmp_path / "out"))
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert "pip install 'teacher-cache[ray]'" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not has_loopback(), reason="needs the loopback interface")
def test_the_command_starts_a_cluster_and_ends_it(cache: Path, tmp_path: Path) -> None:
    """Ray leaves nothing in the home folder or the working folder."""
    base = tiny_run.recipe(cache, tmp_path, epochs=1, loggers=()).model_dump(mode="json", exclude={"out"})
    (tmp_path / "recipe.yaml").write_text(json.dumps(base))
    words = [sys.executable, "-m", "train.sweep.cli", "recipe.yaml", "--students", "resnet8", "--out", "out"]
    marker = {"TEACHER_CACHE_HOME": str(tmp_path / "home"), "HOME": str(tmp_path / "user")}
    environment = os.environ | SETTINGS | marker | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words += ["--engine", "ray", "--ray-address", "local", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in json.loads(done.stdout)["trials"]] == ["finished"]
    assert "Ray: 1 node, " in done.stderr
    assert not (tmp_path / "user/ray_results").exists()
    assert {file.name for file in tmp_path.iterdir()} <= {"recipe.yaml", "out", "user", "home"}
    end = time.monotonic() + 30
    while processes(marker["TEACHER_CACHE_HOME"]):
        assert time.monotonic() < end, "processes are still running"
        time.sleep(0.1)


@contextmanager
def path_for_this_process(folder: Path) -> Iterator[str]:
    """A path of a folder that does not exist for other processes."""
    low = os.open(folder, os.O_RDONLY)
    high = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 900)  # a number that other processes do not use
    try:
        yield f"/proc/self/fd/{high}"
    finally:
        os.close(low)
        os.close(high)
