"""Commands under torchrun, in processes of their own: results, restarts after a kill, and errors printed once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cache_tools.config import dump_yaml
from tests.support import tiny_run
from train.runs.result import load_result

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300.0
TORCHRUN = ("-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")


@contextmanager
def started(module: str, *arguments: object, count: int = 2, restarts: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A command on several ranks."""
    program = f"import torch; torch.set_num_threads(1); from {module} import main; main()"
    words = [sys.executable, *TORCHRUN, "--nproc-per-node", count, "--max-restarts", restarts, "--no-python", "--"]
    words += [sys.executable, "-c", program, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(list(map(str, words)), env=environment, start_new_session=True, **pipes)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(module: str, *arguments: object, count: int = 2, restarts: int = 0) -> tuple[int, str, str]:
    """The exit code of torchrun, and what was printed."""
    with started(module, *arguments, count=count, restarts=restarts) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
        return process.returncode, out, err


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


def rank_of(number: int, torchrun: int) -> int | None:
    """The process of a rank; None before it runs."""
    for folder in Path("/proc").iterdir():
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1] if folder.name.isdigit() else None
            is_ours = parent == str(torchrun)
            if is_ours and f"RANK={number}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue
    return None


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
