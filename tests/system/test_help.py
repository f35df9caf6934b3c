"""The help of every command imports no slow library."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cache_tools.cli import COMMANDS, app

pytestmark = pytest.mark.medium

ROOT = Path(__file__).parents[2]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
SLOW = {"cv2", "matplotlib", "onnx", "open_clip", "optuna", "pandas", "polars", "ray", "scipy", "sklearn", "timm"}
SLOW |= {"torch", "torchvision", "zarr"}


def helps() -> list[list[str]]:
    """Each command, and its subcommands, if it has any."""
    return [*([command] for command in SCRIPTS), *(["cache-tools", name] for name in COMMANDS)]


def test_the_list_of_commands_is_whole_in_80_columns() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}, terminal_width=80).stdout
    listed = [line for line in shown.splitlines() if line.split()[:1] and line.split()[0] in COMMANDS]
    assert len(listed) == len(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)
    assert max(map(len, listed)) <= 80


@pytest.mark.parametrize("words", helps(), ids=" ".join)
def test_help_imports_nothing_slow(words: list[str]) -> None:
    command, *subcommand = words
    module, _, function = SCRIPTS[command].partition(":")
    lines = [
        "import sys",
        f"from {module} import {function}",
        f"sys.argv[1:] = [*{subcommand!r}, '--help']",
        "try:",
        f"    {function}()",
        "finally:",
        f"    print('SLOW', *sorted({SLOW!r} & sys.modules.keys()))",
    ]
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--help" in done.stdout
    assert done.stdout.splitlines()[-1] == "SLOW"
