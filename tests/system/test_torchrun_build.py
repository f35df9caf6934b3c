"""`torchrun … build-cache`: the arrays of one process, each rank's share, and the end of the build after a kill."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from cache_tools.config import dump_yaml
from cache_tools.places import LocalPlace, open_place
from cache_tools.places.claims import claims_place
from cache_tools.places.transfer import copy_cache, list_committed
from pipeline.build.cache import build_cache
from tests.support import tiny_build
from tests.support.s3_server import new_bucket
from tests.support.tiny_build import arrays_of
from tests.support.torchrun import PATIENCE_S, rank_of, run, started
from tests.support.turns import slow

SAMPLES, VIEWS, ROWS = 100, 8, 16
BLOCKS = VIEWS * -(-SAMPLES // ROWS)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_build.prepare(tmp_path_factory.mktemp("files"), train=SAMPLES)


@pytest.fixture(scope="module")
def clean(files: Path) -> dict[str, bytes]:
    """The arrays of a build by one process."""
    build_cache(tiny_build.recipe(files, num_views=VIEWS, block_rows=ROWS, out=files / "clean.zarr"))
    return arrays_of(files / "clean.zarr")


@pytest.fixture(params=["folder", slow("s3")])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path | str:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    if request.param == "folder":
        return tmp_path / "cache.zarr"
    request.getfixturevalue("server")
    return f"s3://{new_bucket()}/group/cache.zarr"


def stored(files: Path, tmp_path: Path, out: Path | str) -> Path:
    """A recipe file."""
    recipe = tiny_build.recipe(files, num_views=VIEWS, block_rows=ROWS, out=out)
    (tmp_path / "tiny.yaml").write_text(dump_yaml(recipe))
    return tmp_path / "tiny.yaml"


def check(out: Path | str, clean: dict[str, bytes], tmp_path: Path) -> None:
    copy_cache(open_place(out), LocalPlace(tmp_path / "copy.zarr"))
    assert arrays_of(tmp_path / "copy.zarr") == clean
    assert not list(claims_place(open_place(out)).entries())


@pytest.mark.medium
def test_two_ranks_build_the_arrays_of_one_process(
    files: Path, clean: dict[str, bytes], tmp_path: Path, out: Path | str
) -> None:
    code, printed, err = run("pipeline.cli", stored(files, tmp_path, out), "--json")
    assert code == 0, err
    (line,) = printed.splitlines()
    result = json.loads(line)
    assert sum(result["images_of_ranks"]) == VIEWS * SAMPLES
    assert all(result["images_of_ranks"])
    assert err.count("blocks to build") == 1
    check(out, clean, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("number", [0, 1])
def test_torchrun_starts_all_ranks_again_after_a_kill(
    files: Path, clean: dict[str, bytes], tmp_path: Path, out: Path | str, number: int
) -> None:
    place = open_place(out)
    with started("pipeline.cli", stored(files, tmp_path, out), "--json", restarts=1) as process:
        end = time.monotonic() + PATIENCE_S
        while len(list_committed(place)) < BLOCKS // 4:
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        pid = rank_of(number, process.pid)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        left = VIEWS * SAMPLES - sum(min(ROWS, SAMPLES - ROWS * block) for _, block in list_committed(place))
        printed, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    result = json.loads(printed.splitlines()[-1])
    assert 0 < sum(result["images_of_ranks"]) <= left, "what was committed is not computed again"
    check(out, clean, tmp_path)
