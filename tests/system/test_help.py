"""The help of every command imports no slow library."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

pytestmark = pytest.mark.medium

ROOT = Path(__file__).parents[2]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
SLOW = {"cv2", "matplotlib", "onnx", "open_clip", "optuna", "pandas", "polars", "ray", "scipy", "sklearn", "timm"}
SLOW |= {"torch", "torchvision", "zarr"}


def helps() -> list[list[str]]:
    """Each command's module, and its subcommands, if it has any."""
    found = []
    for place in SCRIPTS.values():
        module = place.partition(":")[0]
        group = typer.main.get_command(importlib.import_module(module).app)
        found += [[module], *([module, name] for name in getattr(group, "commands", {}))]
    return found


@pytest.mark.parametrize("words", helps(), ids=" ".join)
def test_help_imports_nothing_slow(words: list[str]) -> None:
    module, *subcommand = words
    lines = [
        "import sys",
        f"from {module} import main",
        f"sys.argv[1:] = [*{subcommand!r}, '--help']",
        "try:",
        "    main()",
        "finally:",
        f"    print('SLOW', *sorted({SLOW!r} & sys.modules.keys()))",
    ]
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--help" in done.stdout
    assert done.stdout.splitlines()[-1] == "SLOW"
