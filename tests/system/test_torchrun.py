"""Commands under torchrun, in processes of their own: results, restarts after a kill, and errors printed once."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cache_tools.config import dump_yaml
from tests.support import tiny_run
from tests.support.torchrun import PATIENCE_S, rank_of, run, started
from train.runs.result import load_result


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    return tiny_run.write_cache(root / "tiny.zarr", tiny_run.write_pictures(root / "pictures"))


def stored(cache: Path, out: Path, **changes: object) -> Path:
    """A recipe file."""
    own: dict[str, object] = {"batch_size": 10, "loggers": (), "optimiser": {"learning_rate": 0.02}}
    recipe = tiny_run.recipe(cache, out, **(own | changes))
    file = out.with_suffix(".yaml")
    file.write_text(dump_yaml(recipe))
    return file


@pytest.mark.medium
def test_two_ranks_train_one_student_and_one_of_them_prints(cache: Path, tmp_path: Path) -> None:
    code, out, err = run("train.cli", stored(cache, tmp_path / "run", epochs=1), "--sync-batchnorm")
    assert code == 0, err
    assert out.count("resnet8 distilled") == 1
    assert err.count("pixels: in memory") == 1
    result = load_result(tmp_path / "run")
    assert result is not None
    assert result.environment["ranks"] == "2"
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.slow
def test_an_error_is_printed_once(cache: Path, tmp_path: Path) -> None:
    code, _, err = run("train.cli", stored(cache, tmp_path / "run", batch_size=15))
    assert code == 1
    errors = re.findall(r"error: .*", err)
    assert [line for line in errors if "share a batch" in line] == [
        "error: the processes cannot share a batch equally (--batch-size 15); expected a multiple of 2, the number of "
        "processes. Use --batch-size 14 (the result changes), or another number of processes."
    ]
    assert "exitcode  : 2" in err, "each process ends with the code of a bad input"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("minutes", [None, 1e-9])
def test_a_killed_rank_is_started_again_and_the_result_is_the_same(
    cache: Path, tmp_path: Path, number: int, minutes: float | None
) -> None:
    settings: dict[str, object] = {
        "epochs": 6,
        "sync_batchnorm": True,
        "loss": {"kind": "kd", "feature": "crd", "crd_negatives": 8},
        "ema_decay": 0.9,
        "checkpoint_every_minutes": minutes,
    }
    whole = run("train.cli", stored(cache, tmp_path / "whole", **settings))
    assert whole[0] == 0, whole[2]
    with started("train.cli", stored(cache, tmp_path / "killed", **settings), restarts=1) as process:
        end = time.monotonic() + PATIENCE_S
        while not (tmp_path / "killed/state.pt").exists():
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        pid = rank_of(number, process.pid)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err
    for name in ("last", "ema", "best"):
        one, other = (load_file(tmp_path / run_name / f"{name}.safetensors") for run_name in ("whole", "killed"))
        assert all(one[key].equal(other[key]) for key in other), name
