"""The version, the changelog and the build files agree with each other."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

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


def test_oldest_versions_are_the_lower_bounds() -> None:
    """`make test-oldest` installs what constraints-oldest.txt says: of every direct dependency, the lowest version."""
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(name): Version(version)
        for name, version in (line.split("==") for line in lines if "==" in line)
    }
    extras = PROJECT["project"]["optional-dependencies"]
    # Not that of the examples: transformers asks for newer versions of our own dependencies.
    groups = [PROJECT["project"]["dependencies"], *(extras[name] for name in extras if name != "examples")]
    requirements = [Requirement(text) for group in groups for text in group]
    bounds = {
        canonicalize_name(requirement.name): Version(specifier.version)
        for requirement in requirements
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }
    assert len(bounds) > 40
    assert {name: pinned[name] for name in bounds} == bounds, "run `make constraints-oldest`, or raise the lower bound"


def test_workflow_calls_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    called = {
        step["run"].removeprefix("make ")
        for job in workflow["jobs"].values()
        for step in job["steps"]
        if step.get("run", "").startswith("make ")
    }
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    called = called - {"${{ matrix.target }}"} | {*matrix["target"], *(each["target"] for each in matrix["include"])}
    assert {"test", "test-oldest", "demo", "docs", "dist"} <= called <= targets


def test_hooks_run_the_tools_of_the_environment() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/")


def test_pytest_looks_into_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    patterns = pytestconfig.getini("norecursedirs")
    folders = {path.name for file in (ROOT / "tests").rglob("test_*.py") for path in file.relative_to(ROOT).parents}
    assert not [name for name in folders for pattern in patterns if name and fnmatch.fnmatch(name, pattern)]
