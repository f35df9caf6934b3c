"""The version, the changelog and the build files agree with each other."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import cache_tools

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_version_is_that_of_the_installed_package() -> None:
    assert cache_tools.__version__ == version("teacher-cache")


def test_importing_cache_tools_does_not_read_metadata() -> None:
    """Reading the metadata of installed packages takes about 50 ms; commands start without it."""
    code = "import cache_tools, sys; assert 'importlib.metadata' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_version_without_a_tag_starts_from_the_last_release() -> None:
    released = re.findall(
        r"^## (\d+\.\d+\.\d+) - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert PROJECT["tool"]["hatch"]["version"]["fallback-version"] == released[0]


def test_changelog_has_one_section_for_what_is_not_released() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings.count("Unreleased") == 1
