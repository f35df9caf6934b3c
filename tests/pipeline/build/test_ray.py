"""Builds on a Ray cluster: the arrays of one process, also if a node is lost or joins, on a disk and in a store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cache_tools.config import dump_yaml
from cache_tools.errors import DataError, DeviceError, RecipeError, StorageError
from cache_tools.places import LocalPlace, Place, open_place
from cache_tools.places.claims import claims_place
from cache_tools.places.transfer import copy_cache, list_committed
from pipeline.build.cache import build_cache
from pipeline.build.ray.engine import build_on_ray
from pipeline.cli import app
from tests.support import tiny_build
from tests.support.ray_nodes import ROOT, SETTINGS, Cluster, cluster, meanwhile, processes
from tests.support.s3_server import has_loopback, new_bucket
from tests.support.tiny_build import arrays_of

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray (the ray extra)")
SAMPLES, VIEWS, ROWS = 150, 10, 16
BLOCKS = VIEWS * -(-SAMPLES // ROWS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_build.prepare(tmp_path_factory.mktemp("ray"))


@pytest.fixture(scope="module")
def clean(root: Path) -> dict[str, bytes]:
    """The arrays of a build by one process."""
    build_cache(recipe(root, root / "clean.zarr"))
    return arrays_of(root / "clean.zarr")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, server: str) -> Iterator[Cluster]:
    """Two nodes that reach the S3 server."""
    with pytest.MonkeyPatch.context() as patch, cluster(tmp_path_factory.mktemp("nodes")) as made:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        yield made


def recipe(root: Path, out: Path | str, **changes: Any) -> Any:
    return tiny_build.recipe(root, **({"num_views": VIEWS, "block_rows": ROWS, "out": out} | changes))


def check(place: Place, clean: dict[str, bytes], tmp_path: Path) -> None:
    """Check that a cache has the bytes of one process, and that nothing lies beside it."""
    copy_cache(place, LocalPlace(tmp_path / "copy.zarr"))
    assert arrays_of(tmp_path / "copy.zarr") == clean
    assert not list(claims_place(place).entries())


def mirrored(home: Path) -> int:
    """Number of blocks in the mirror of a node."""
    return len(list(home.glob("tiny-*.zarr/commits/c.*")))


def without_mirrors(nodes: Cluster) -> None:
    """Remove what earlier tests left on the nodes: it would be uploaded instead of computed."""
    for home in nodes.homes:
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.medium
@pytest.mark.skipif(not has_loopback(), reason="needs the loopback interface")
def test_the_command_starts_a_cluster_and_ends_it(root: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """One worker on this machine, and a cache on its disk."""
    (tmp_path / "tiny.yaml").write_text(dump_yaml(recipe(root, tmp_path / "cache.zarr")))
    marker = {"TEACHER_CACHE_HOME": str(tmp_path / "home"), "HOME": str(tmp_path / "user")}
    environment = os.environ | SETTINGS | marker | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "pipeline.cli", "tiny.yaml", "--engine", "ray", "--ray-address", "local"]
    words += ["--ray-workers", "1", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["images_computed"] == VIEWS * SAMPLES
    assert done.stderr.count("Ray: 1 node, 1 worker with 1 CPUs each") == 1
    check(LocalPlace(tmp_path / "cache.zarr"), clean, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} <= {"tiny.yaml", "cache.zarr", "copy.zarr", "user", "home"}
    end = time.monotonic() + 30
    while processes(marker["TEACHER_CACHE_HOME"]):
        assert time.monotonic() < end, "processes are still running"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_two_nodes_build_the_arrays_of_one_process(
    nodes: Cluster, root: Path, clean: dict[str, bytes], tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "cache.zarr" if kind == "folder" else f"s3://{new_bucket()}/group/cache.zarr"
    without_mirrors(nodes)
    lines: list[str] = []
    result = build_on_ray(recipe(root, out), nodes.address, say=lines.append)
    assert lines[0] == "Ray: 2 nodes, 2 workers with 1 CPUs each"
    assert lines[-1].startswith(f"{BLOCKS} of {BLOCKS} blocks to build in ")
    assert result.images == VIEWS * SAMPLES
    check(open_place(out), clean, tmp_path)
    if kind == "s3":
        assert result.bytes_moved >= sum(entry.size for entry in open_place(out).entries())
        counts = [mirrored(home) for home in nodes.homes]
        assert min(counts) > 0
        assert sum(counts) == BLOCKS, "each node has what it computed, and uploads it itself"
    again: list[str] = []
    assert build_on_ray(recipe(root, out), nodes.address, say=again.append).images == 0
    assert "is complete: nothing to do" in again[-1]


@pytest.mark.slow
def test_a_lost_node_and_one_that_joins(nodes: Cluster, root: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """One node dies half-way, with blocks in work, and the other goes on; then it joins again and takes blocks."""
    url = f"s3://{new_bucket()}/group/cache.zarr"
    without_mirrors(nodes)
    phases: list[int] = []

    def disturb() -> bool:
        if not phases:
            builders = nodes.builders(1)
            if not builders or min(map(mirrored, nodes.homes)) < 5:
                return False
            os.kill(builders[0], signal.SIGSTOP)  # it has claimed blocks that it does not finish
            nodes.kill(1)
            phases.append(len(list_committed(open_place(url))))
            return False
        if len(phases) == 1:
            if len(list_committed(open_place(url))) < phases[0] + 10:
                return False
            os.kill(nodes.builders(0)[0], signal.SIGSTOP)  # the other one alone commits from now on
            phases.append(mirrored(nodes.homes[1]))
            nodes.start(1)
        if mirrored(nodes.homes[1]) < phases[1] + 5:
            return False
        os.kill(nodes.builders(0)[0], signal.SIGCONT)
        return True

    with meanwhile(disturb) as done:
        result = build_on_ray(recipe(root, url, num_views=2 * VIEWS), nodes.address)
    assert done.is_set(), phases
    assert result.images <= 2 * VIEWS * SAMPLES
    place = open_place(url)
    assert len(list_committed(place)) == 2 * BLOCKS
    copy_cache(place, LocalPlace(tmp_path / "copy.zarr"), views=range(VIEWS))
    built = arrays_of(tmp_path / "copy.zarr")
    names = [name for name in clean if "/c." in name]
    assert [name for name in names if built[name] != clean[name]] == []
    assert not list(claims_place(place).entries())


@pytest.mark.slow
def test_errors_of_workers_and_of_the_cluster(
    nodes: Cluster, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken.zarr"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(StorageError, match="the place is taken"):
        build_on_ray(recipe(root, taken), nodes.address)
    bad = tiny_build.prepare(tmp_path / "bad", train=60)
    victim = sorted((bad / "pictures/train/red").iterdir())[-1]
    victim.write_bytes(victim.read_bytes()[:60])
    with pytest.raises(DataError, match=victim.name):
        build_on_ray(recipe(bad, tmp_path / "bad.zarr"), nodes.address)
    with pytest.raises(StorageError, match=r"do not see the folder of the build.*or a URL"):
        build_on_ray(recipe(root, Path("/proc/self/cwd/cache.zarr")), nodes.address)
    monkeypatch.setattr("pipeline.build.ray.engine.torch_threads", lambda: 2)
    with pytest.raises(DeviceError, match="no node"):
        build_on_ray(recipe(root, tmp_path / "c.zarr"), nodes.address)
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".ray")]


def test_what_does_not_work_with_ray_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, message in (
        (["--ray-gpus", "0.5"], "needs the Ray engine"),
        (["--ray-workers", "2"], "needs the Ray engine"),
        (["--ray-address", "auto"], "needs the Ray engine"),
        (["--engine", "ray", "--plan"], "builds nothing"),
        (["--engine", "ray", "--keep-views", "2"], "drop no views"),
        (["--engine", "ray", "--ray-address", "ray://host:10001"], "Ray's client"),
        (["--engine", "ray", "--device", "cuda:1"], "Ray chooses the device"),
    ):
        done = CliRunner().invoke(app, ["digits", *words])
        assert done.exit_code == 2, done.output
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    own = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "host", "MASTER_PORT": 1}
    for name, value in own.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RecipeError, match="torchrun and Ray"):
        build_on_ray(recipe(root, "s3://bucket/cache.zarr"))


@pytest.mark.slow
def test_sigterm_ends_the_workers(nodes: Cluster, root: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    file, out = tmp_path / "tiny.yaml", tmp_path / "cache.zarr"
    file.write_text(dump_yaml(recipe(root, out)))
    words = [sys.executable, "-m", "pipeline.cli", str(file), "--engine", "ray", "--ray-address", nodes.address]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as build:
        end = time.monotonic() + 200
        while len(list(out.glob("commits/c.*"))) < 10:
            assert time.monotonic() < end
            assert build.poll() is None, build.communicate()
            time.sleep(0.01)
        build.send_signal(signal.SIGTERM)
        told_s = time.monotonic()
        _, err = build.communicate(timeout=100)
        took_s = time.monotonic() - told_s
    assert build.returncode == 143, err
    assert err.splitlines()[-1] == "Stopped by SIGTERM. Run the same command again to resume."
    assert took_s < 90, "a few seconds on an idle machine"
    assert not list(claims_place(LocalPlace(out)).entries()), "other builders need not wait for its claims"
    assert not [*nodes.builders(0), *nodes.builders(1)]
    assert 0 < build_on_ray(recipe(root, out), nodes.address).images < VIEWS * SAMPLES
    check(LocalPlace(out), clean, tmp_path)
