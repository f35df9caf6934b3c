"""The help of every command imports no slow library."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cache_tools.cli import COMMANDS

pytestmark = pytest.mark.medium

ROOT = Path(__file__).parents[2]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
SLOW = {"cv2", "matplotlib", "onnx", "open_clip", "optuna", "pandas", "polars", "ray", "scipy", "sklearn", "timm"}
SLOW |= {"torch", "torchvision", "zarr"}


def helps() -> list[list[str]]:
    """Each command, and its subcommands, if it has any."""
    return [*([command] for command in SCRIPTS), *(["cache-tools", name] for name in COMMANDS)]


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
