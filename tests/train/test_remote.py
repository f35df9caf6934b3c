"""`train-student` from a URL gives the same student, bit for bit, even from an unreliable store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_tools.errors import StorageError
from cache_tools.home import registry
from cache_tools.reader import TeacherCache
from tests.support import tiny_run
from tests.support.flaky_proxy import FlakyProxy, flaky_proxy
from tests.support.preloaded import Preloaded, run_module
from tests.support.s3_server import new_bucket, upload
from train.run import train_student
from train.runs.stored import open_run


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return tiny_run.write_cache(tmp_path_factory.mktemp("local") / "tiny.zarr", pictures)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, local: Path) -> bytes:
    """The weights of the student from the local cache."""
    out = tmp_path_factory.mktemp("reference") / "run"
    train_student(tiny_run.recipe(local, out))
    return (out / "last.safetensors").read_bytes()


@pytest.fixture
def proxy(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    """A proxy in front of the S3 server, without failures yet, and an empty cache home."""
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    with flaky_proxy(seed=5) as proxy:
        yield proxy


@pytest.fixture
def url(proxy: FlakyProxy, local: Path) -> str:
    url = f"s3://{new_bucket()}/caches/tiny.zarr"
    upload(local, url)
    proxy.forget()
    return url


def training(url: str, out: Path) -> Preloaded:
    """`train-student` with the settings of `tiny_run.recipe`."""
    recipe = tiny_run.recipe("unused", out).model_dump(mode="json", exclude={"cache", "out", "fusion"})
    file = out.parent / "recipe.yaml"
    file.write_text(json.dumps(recipe))  # JSON is valid YAML
    return Preloaded(run_module, "train.cli", str(file), "--cache", url, "--out", str(out))


def test_a_remote_cache_gives_the_same_student(proxy: FlakyProxy, url: str, weights: bytes, tmp_path: Path) -> None:
    done = training(url, tmp_path / "run")
    _, err = done.communicate(timeout=500)
    assert done.returncode == 0, err
    assert (tmp_path / "run/last.safetensors").read_bytes() == weights
    assert "stage tiny, view 2: 4/4 blocks" in err
    record = json.loads((tmp_path / "run/cache.json").read_text())
    mirror = next((tmp_path / "home").glob("tiny-*.zarr"))
    assert (record["url"], record["path"]) == (url, str(mirror))
    assert open_run(tmp_path / "run")[0].cache == mirror
    shutil.rmtree(mirror)
    assert open_run(tmp_path / "run")[0].cache == url, "the mirror is gone: it is read from the store again"


def test_only_the_views_and_arrays_of_the_run_are_downloaded(proxy: FlakyProxy, url: str, tmp_path: Path) -> None:
    train_student(tiny_run.recipe(url, tmp_path / "run", num_views=2, epochs=5))
    mirror = TeacherCache.open(url)
    assert registry.read_complete_views(mirror.path, mirror.manifest) == [0, 1]


def test_a_store_that_fails_a_fifth_of_its_requests_gives_the_same_student(
    proxy: FlakyProxy, url: str, weights: bytes, tmp_path: Path
) -> None:
    proxy.fail(0.2)
    train_student(tiny_run.recipe(url, tmp_path / "run"))
    assert sum(seen.failure is not None for seen in proxy.seen) > 3
    assert (tmp_path / "run/last.safetensors").read_bytes() == weights


def test_a_run_that_loses_its_store_stops_and_resumes(
    proxy: FlakyProxy, url: str, weights: bytes, tmp_path: Path
) -> None:
    """Two views are staged; the third epoch needs the third."""
    first = TeacherCache.open(url)
    assert first.is_complete
    for view in (0, 1):
        first.load_view(view)
    message = r"does not answer as it should.*the same command: it continues"
    with proxy.gone(), pytest.raises(StorageError, match=message):
        train_student(tiny_run.recipe(url, tmp_path / "run"))
    assert not (tmp_path / "run/last.safetensors").exists()
    train_student(tiny_run.recipe(url, tmp_path / "run"))
    assert (tmp_path / "run/last.safetensors").read_bytes() == weights


def test_a_staged_cache_needs_no_network(
    proxy: FlakyProxy, url: str, weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TeacherCache.open(url)
    for view in cache.complete_views:
        cache.load_view(view)
    proxy.forget()
    monkeypatch.setenv("TEACHER_CACHE_OFFLINE", "1")
    train_student(tiny_run.recipe(url, tmp_path / "run"))
    assert (tmp_path / "run/last.safetensors").read_bytes() == weights
    assert proxy.seen == []


@pytest.mark.slow
def test_several_runs_at_once_download_each_view_once(
    proxy: FlakyProxy, url: str, weights: bytes, tmp_path: Path
) -> None:
    runs = [tmp_path / f"{number}" / "run" for number in range(2)]
    for run in runs:
        run.parent.mkdir()
    processes = [training(url, run) for run in runs]
    errors = [process.communicate(timeout=500)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert [(run / "last.safetensors").read_bytes() == weights for run in runs] == [True, True]
    chunks = [path for path in proxy.paths("GET") if "/fused_" in path and "/c." in path]
    assert len(chunks) == len(set(chunks)) == 2 * 3 * 4
