"""Commands killed at random instants, and disks that fill up at chosen moments: no block is lost and none is wrong."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cache_tools.reader import TeacherCache
from tests.support.cache_factory import build, tiny_images, tiny_manifest
from tests.support.preloaded import Preloaded, run_script
from tests.support.s3_server import has_loopback
from tests.support.turns import LONG, slow, turns
from tests.system import full_disk

KILLS = turns(2, 8)
ALWAYS, SLOW = ("recode",), ("build", "grow", "fuse", "push", "push-s3", "build-s3")
SWEEP_KILLS = 10

pytestmark = [pytest.mark.turns, pytest.mark.timeout(1800)]


def lines_of(script: str, *arguments: str) -> list[dict[str, Any]]:
    """The JSON lines that a script prints; fails if it found a problem."""
    process = Preloaded(run_script, Path(__file__).with_name(script), *arguments)
    out, err = process.communicate(timeout=1800)
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert process.returncode == 0, "\n".join([*(str(line) for line in lines if line.get("problems")), err])
    return lines


@pytest.fixture(scope="module")
def killed() -> list[dict[str, Any]]:
    """The lines of `faults.py` about every kill, and its summary."""
    names = [name for name in (*ALWAYS, *(SLOW if LONG else ())) if has_loopback() or not name.endswith("s3")]
    return lines_of("faults.py", "--kills", str(KILLS), "--of", *names)


@pytest.mark.parametrize("name", [*ALWAYS, *map(slow, SLOW)])
def test_a_killed_command_goes_on_to_the_cache_of_an_undisturbed_one(killed: list[dict[str, Any]], name: str) -> None:
    if name.endswith("s3") and not has_loopback():
        pytest.skip("needs the loopback interface")
    lines = [line for line in killed[:-1] if line["of"] == name]
    assert not any(line["problems"] for line in lines)
    kills = [line for line in lines if "kill" in line]
    assert len(kills) == KILLS
    if LONG:
        assert any(0 < line["committed"] < line["blocks"] for line in kills), "no kill came half-way: nothing is shown"
        assert sum(line["refused"] for line in kills) > 0
    finished = [line for line in lines if "finished" in line]
    assert len(finished) >= KILLS // 3
    assert all(line["committed"] == line["blocks"] > 0 for line in finished)


def test_there_are_fifty_kills(killed: list[dict[str, Any]]) -> None:
    total = killed[-1]
    assert total["kills"] == sum(total["of"].values())
    assert total["kills"] >= turns(KILLS, 50 if has_loopback() else 30)
    assert total["rows_compared"] > turns(300, 5000)
    if LONG:
        assert total["half_way"] > 0
        assert total["refused"] > 0


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_results_of_an_undisturbed_one() -> None:
    """The same table, weights and page."""
    *lines, total = lines_of("faults.py", "--kills", str(SWEEP_KILLS), "--of", "sweep")
    assert (total["kills"], total["problems"]) == (SWEEP_KILLS, 0)
    if LONG:
        assert total["half_way"] > 0, "no kill came half-way: nothing is shown"
    finished = [line for line in lines if "finished" in line]
    assert all(line["committed"] == line["blocks"] == 4 for line in finished)
    assert len(finished) >= SWEEP_KILLS // 3


@pytest.mark.skipif(not full_disk.permitted(), reason="mounting a small disk needs user namespaces")
def test_a_full_disk_is_one_clear_error_at_any_moment_and_the_command_goes_on_later() -> None:
    cases = list(full_disk.MOMENTS) if LONG else ["push"]
    *lines, total = lines_of("full_disk.py", "--of", *cases)
    assert total == {"full_disks": sum(len(full_disk.MOMENTS[name]) for name in cases), "problems": 0}
    assert {line["of"] for line in lines} == set(cases)
    assert sum(0 < line["committed"] < line["blocks"] for line in lines) >= turns(1, 5)


def test_a_quota_is_one_clear_error_and_the_copy_goes_on_later(tmp_path: Path) -> None:
    """No file may be longer than 300 bytes. Metadata files are longer, so the copy fails before there is a cache."""
    images = tiny_images()
    build(tmp_path / "source.zarr", tiny_manifest(images, canaries=False), images)
    command = [sys.executable, "-m", "cache_tools.cli", "push", str(tmp_path / "source.zarr"), str(tmp_path / "c.zarr")]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))

    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    refused = subprocess.run(command, preexec_fn=limited, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2, refused.stderr
    assert "File too large" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    subprocess.run(command, check=True, capture_output=True)
    assert TeacherCache.open(tmp_path / "c.zarr").is_complete
