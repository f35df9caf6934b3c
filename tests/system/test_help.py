"""The help of every command imports no slow library."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cache_tools.cli import _COMMANDS as COMMANDS
from cache_tools.cli import app

pytestmark = pytest.mark.medium

ROOT = Path(__file__).parents[2]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
SLOW = {"cv2", "matplotlib", "onnx", "open_clip", "optuna", "pandas", "polars", "ray", "scipy", "sklearn", "timm"}
SLOW |= {"torch", "torchvision", "zarr"}


def test_the_list_of_commands_is_whole_in_80_columns() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}, terminal_width=80).stdout
    listed = [line for line in shown.splitlines() if line.split()[:1] and line.split()[0] in COMMANDS]
    assert len(listed) == len(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)
    assert max(map(len, listed)) <= 80


@pytest.mark.parametrize("command", SCRIPTS)
def test_help_imports_nothing_slow(command: str) -> None:
    """Of a command, and of all its subcommands one after the other in the same process."""
    module, _, function = SCRIPTS[command].partition(":")
    pages = [[], *([name] for name in COMMANDS if command == "cache-tools")]
    lines = [
        "import sys",
        f"from {module} import {function}",
        f"for words in {pages!r}:",
        "    sys.argv[1:] = [*words, '--help']",
        "    try:",
        f"        {function}()",
        "    except SystemExit as leaving:",
        "        assert not leaving.code, (words, leaving.code)",
        f"    print('SLOW', *sorted({SLOW!r} & sys.modules.keys()))",
    ]
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *shown, after = re.split(r"^SLOW(.*)\n", done.stdout, flags=re.MULTILINE)
    assert after == ""
    assert len(shown) == 2 * len(pages)
    assert all("--help" in page for page in shown[::2])
    assert shown[1::2] == [""] * len(pages)
