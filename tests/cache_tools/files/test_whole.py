"""Files that are written as a whole, and what killed processes leave of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache_tools.files import find_leftovers, is_partial

HALF = """
import os, signal, sys
from pathlib import Path
from cache_tools.files import replaced_durably

with replaced_durably(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
WHOLE = """
import sys
from pathlib import Path
from cache_tools.files import put_durably

put_durably(Path(sys.argv[1]), b"")
"""


@pytest.mark.medium
@pytest.mark.parametrize("days", [-1, 1], ids=["yesterday", "before the clock was set back"])
def test_the_next_process_that_writes_in_a_folder_removes_what_a_killed_one_left(tmp_path: Path, days: int) -> None:
    subprocess.run([sys.executable, "-c", HALF, str(tmp_path / "stats.json")], check=False)
    (left,) = tmp_path.iterdir()
    assert is_partial(left.name)
    other = tmp_path / "download.partial"
    other.write_bytes(b"of somebody")
    write = [sys.executable, "-c", WHOLE, str(tmp_path / "summary.parquet")]
    subprocess.run(write, check=True)
    assert left.exists(), "another process may still be writing it"
    for file in (left, other):
        os.utime(file, (time.time() + days * 86_400,) * 2)
    subprocess.run(write, check=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["download.partial", "summary.parquet"]


def test_a_half_built_cache_from_the_future_is_a_leftover(tmp_path: Path) -> None:
    half = tmp_path / f".tiny.zarr.{'0' * 32}.partial"
    half.mkdir()
    assert find_leftovers(tmp_path) == []
    os.utime(half, (time.time() + 86_400,) * 2)
    assert find_leftovers(tmp_path) == [half]
