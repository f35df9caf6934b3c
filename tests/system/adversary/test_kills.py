"""Commands killed at every step in which they change the disk: the same command goes on, and gives the same results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.kill_cases import CASES
from tests.support.preloaded import Preloaded, run_script
from tests.support.turns import LONG

# In `make test`, a few kills of commands that start fast. In `make test-slow`, every step of every command.
SHORT = ["--of", "push", "rm", "train-inside", "--kills", "2"]
GROUPS = 6  # of the long form, which the processes of pytest share


def kill(*options: str) -> list[dict[str, Any]]:
    """The lines that `kills.py` prints; fails if a command did not go on."""
    process = Preloaded(run_script, Path(__file__).with_name("kills.py"), *options)
    out, err = process.communicate(timeout=7200)
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    problems = [json.dumps(line["problems"], indent=2) for line in lines if line["problems"]]
    assert process.returncode == 0, "\n".join([*problems, err])
    return lines


@pytest.mark.turns
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("group", range(GROUPS) if LONG else [0])
def test_a_command_killed_at_any_step_goes_on_to_the_same_result(group: int) -> None:
    names = [case.name for case in CASES][group::GROUPS]
    *lines, total = kill(*(["--of", *names] if LONG else SHORT))
    assert [line["of"] for line in lines] == (names if LONG else SHORT[1:4])
    assert all(line["kills"] >= (line["states"] * 0.9 if LONG else 2) for line in lines)
    assert total["problems"] == 0
