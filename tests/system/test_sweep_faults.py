"""A sweep killed at random instants goes on to the table, the weights and the page of an undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

KILLS = 10


def test_a_killed_sweep_goes_on_as_if_nothing_had_happened() -> None:
    command = [sys.executable, str(Path(__file__).with_name("faults.py")), "--kills", str(KILLS), "--of", "sweep"]
    done = subprocess.run(command, capture_output=True, text=True)
    *lines, total = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, "\n".join([*(str(line) for line in lines if line["problems"]), done.stderr])
    assert (total["kills"], total["problems"]) == (KILLS, 0)
    assert total["half_way"] > 0, "no kill came half-way: nothing is shown"
    finished = [line for line in lines if "finished" in line]
    assert all(line["committed"] == line["blocks"] == 4 for line in finished)
    assert len(finished) >= KILLS // 3
