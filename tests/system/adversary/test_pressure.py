"""Commands under pressure: memory that ends during training, and a clock that jumps."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.build.cache import build_cache
from tests.support import tiny_build, tiny_run
from tests.support.kill_cases import contents
from tests.support.shortcuts import take_shortcuts
from tests.support.tiny_build import arrays_of
from train.run import train_student

REAL_TIME = time.time

# A run that is interrupted, continued where memory ends in the first step, and continued again.
MEMORY = """
import os, resource, signal, sys
from pathlib import Path
import pytest
import torch

torch.set_num_threads(1)
import torch._dynamo  # here, because every child would import it
import train.run.train
from tests.support.shortcuts import take_shortcuts
from tests.support import tiny_run
from train.cli import app
from train.loop import Learner

os.chdir(sys.argv[1])
os.environ["TEACHER_CACHE_HOME"] = str(Path("home").absolute())
recipe = tiny_run.recipe(Path("tiny.zarr").absolute(), Path("run").absolute(), epochs=2, loggers=())
Path("train.yaml").write_text(recipe.model_dump_json())
train_epoch, step = train.run.train.train_epoch, Learner.step


def killed(learners, feed, epoch, *args, **kwargs):
    if epoch == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_epoch(learners, feed, epoch, *args, **kwargs)


def short_of_memory(learner, *args):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), resource.RLIM_INFINITY))
    try:
        return step(learner, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def start(out, epochs=train_epoch, steps=step):
    child = os.fork()
    if child == 0:
        train.run.train.train_epoch, Learner.step = epochs, steps
        code = 0
        with pytest.MonkeyPatch.context() as patch:
            take_shortcuts(patch)
            try:
                app(["train.yaml", "--out", out], standalone_mode=False)
            except SystemExit as leaving:
                code = leaving.code
        os._exit(code or 0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


codes = [start("run", killed), start("run", steps=short_of_memory), start("run"), start("clean")]
assert codes == [-signal.SIGKILL, 2, 0, 0], codes
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
def test_memory_that_ends_is_one_clear_error_and_the_run_goes_on_later(tmp_path: Path) -> None:
    tiny_run.write_cache(tmp_path / "tiny.zarr", tiny_run.write_pictures(tmp_path / "pictures", train=20, test=9))
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert "memory" in errors[0]
    assert "Traceback" not in done.stderr
    run, clean = contents(tmp_path / "run"), contents(tmp_path / "clean")
    for name in ("last.safetensors", "best.safetensors", "metrics.parquet", "state.pt", "test.parquet"):
        assert run[name] == clean[name], name


@pytest.fixture
def jumping_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day is right, a day ahead, then two days behind, and so on."""
    jumps = itertools.cycle([0.0, 86_400.0, -172_800.0])
    monkeypatch.setattr(time, "time", lambda: REAL_TIME() + next(jumps))


@pytest.mark.medium
def test_a_clock_that_jumps_changes_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    take_shortcuts(monkeypatch)
    cache = tiny_run.write_cache(
        tmp_path / "tiny.zarr", tiny_run.write_pictures(tmp_path / "pictures", train=20, test=9)
    )

    def train() -> dict[str, str]:
        recipe = tiny_run.recipe(cache, tmp_path / "run", epochs=2, loggers=(), checkpoint_every_minutes=1e-9)
        result = train_student(recipe, overwrite=True)
        assert 0 < result.train_s < 600
        return contents(tmp_path / "run")

    expected = train()
    request.getfixturevalue("jumping_clock")
    assert train() == expected


@pytest.mark.medium
@pytest.mark.usefixtures("jumping_clock")
def test_a_clock_that_jumps_changes_no_build(tmp_path: Path) -> None:
    tiny_build.prepare(tmp_path, train=40)
    changes = {"num_views": 2, "block_rows": 16, "clip": None}
    first = tiny_build.recipe(tmp_path, out=tmp_path / "cache.zarr", **changes)
    build_cache(first)
    (tmp_path / "cache.zarr" / "commits" / "c.1.1.0").unlink()
    before = arrays_of(tmp_path / "cache.zarr")
    assert build_cache(first).images == 16
    build_cache(tiny_build.recipe(tmp_path, out=tmp_path / "other.zarr", **changes))
    assert arrays_of(tmp_path / "cache.zarr") == arrays_of(tmp_path / "other.zarr")
    assert before.keys() < arrays_of(tmp_path / "cache.zarr").keys()
    assert not list(tmp_path.glob(".*.claims"))
