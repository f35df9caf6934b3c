"""Commands killed at random instants, and disks that fill up at chosen moments: nothing is lost, nothing is made up."""

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
from tests.support.s3_server import has_loopback
from tests.system import full_disk

KILLS = 8
KILLED = ("build", "grow", "fuse", "push", "recode", "push-s3", "build-s3")


def lines_of(script: str, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, "\n".join([*(str(line) for line in lines if line.get("problems")), done.stderr])
    return lines


@pytest.fixture(scope="module")
def killed() -> list[dict[str, Any]]:
    """What became of all the commands that were killed."""
    of = [name for name in KILLED if has_loopback() or not name.endswith("s3")]
    return lines_of("faults.py", "--kills", str(KILLS), "--of", *of)


@pytest.mark.parametrize("name", KILLED)
def test_nothing_is_lost_or_made_up_by_kills(killed: list[dict[str, Any]], name: str) -> None:
    if name.endswith("s3") and not has_loopback():
        pytest.skip("needs the loopback interface")
    lines = [line for line in killed[:-1] if line["of"] == name]
    assert not any(line["problems"] for line in lines)
    kills = [line for line in lines if "kill" in line]
    assert len(kills) == KILLS
    assert any(0 < line["committed"] < line["blocks"] for line in kills), "no kill came half-way: nothing is shown"
    assert sum(line["refused"] for line in kills) > 0
    finished = [line for line in lines if "finished" in line]
    assert len(finished) >= KILLS // 3
    assert all(line["committed"] == line["blocks"] > 0 for line in finished)


def test_there_are_fifty_kills(killed: list[dict[str, Any]]) -> None:
    assert killed[-1]["kills"] == sum(killed[-1]["of"].values())
    assert killed[-1]["kills"] >= (50 if has_loopback() else 30)
    assert killed[-1]["rows_compared"] > 5000


@pytest.mark.skipif(not full_disk.permitted(), reason="mounting a small disk needs user namespaces")
def test_a_full_disk_is_one_clear_error_at_any_moment_and_the_command_goes_on_later() -> None:
    *lines, total = lines_of("full_disk.py")
    assert total == {"full_disks": sum(map(len, full_disk.MOMENTS.values())), "problems": 0}
    assert {line["of"] for line in lines} == set(full_disk.MOMENTS)
    assert sum(0 < line["committed"] < line["blocks"] for line in lines) >= 5


def test_a_quota_is_one_clear_error_and_the_copy_goes_on_later(tmp_path: Path) -> None:
    """No file may be longer than 300 bytes: metadata is, so the copy fails before there is a cache."""
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
