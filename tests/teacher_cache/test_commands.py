"""Every command, and every process that a command starts, imports our packages beside a user's train.py."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from cache_tools.system import processes
from tests.teacher_cache.conftest import ROOT, Python

SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
POINTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
    "teacher_cache.plugins"
]


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """The scripts that pip writes for the commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for command, place in SCRIPTS.items():
        module, _, function = place.partition(":")
        (folder / command).write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    return folder


@pytest.mark.medium
@pytest.mark.parametrize("command", SCRIPTS)
def test_help_beside_modules_of_the_same_names(python: Python, bin_folder: Path, command: str) -> None:
    done = python(str(bin_folder / command), "--help")
    assert f"Usage: {command}" in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
def test_every_command_works_beside_modules_of_the_same_names(
    python: Python, project: Path, bin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(project / "home"))

    def run(command: str, *arguments: str) -> str:
        return python(str(bin_folder / command), *arguments).stdout

    settings = ("--set", "num_views=2", "--set", "preflight_samples=64", "--set", "device=cpu", "--store", "components")
    run("build-cache", *settings, "--json")
    short = ("digits", "--epochs", "1", "--set", "compare_with_labels=false", "--set", "device=cpu")
    run("train-student", *short, "--out", "run", "--json")
    swept = (
        "--students",
        "resnet8",
        "--losses",
        "kd,ce",
        "--workers",
        "2",
        "--out",
        "sweep",
        "--json",
        "--epochs",
        "1",
    )
    trials = json.loads(run("sweep-students", "digits", *swept))["trials"]
    assert [trial["status"] for trial in trials] == ["finished", "finished"]
    assert "top-1" in run("evaluate-student", "run")
    run("export-student", "run", "--format", "safetensors")
    run("report-students", "run", "--out", "page.html")
    assert (project / "page.html").exists()
    for arguments in (["ls"], ["stats", "digits"], ["verify", "digits", "--replay", "4"], ["tune-fusion", "digits"]):
        run("cache-tools", *arguments)


@pytest.mark.medium
def test_processes_of_sweeps_import_our_packages(python: Python) -> None:
    words = processes.command_for("train.sweep.cli")[1:]
    assert "Usage" in python(*words, "--help").stdout


@pytest.mark.medium
def test_pools_of_processes_import_our_packages(forked_python: Python) -> None:
    code = (
        "from teacher_cache import losses\n"
        "from cache_tools.system.processes import process_pool\n"
        "from train.recipe.student_names import canonical_student_name\n"
        "with process_pool(1) as pool: print(pool.submit(canonical_student_name, 'RESNET8X4').result())"
    )
    assert forked_python(code).stdout == "resnet8x4\n"


@pytest.mark.medium
def test_processes_of_ray_import_our_packages(forked_python: Python, project: Path) -> None:
    """Functions travel by their code; a process of Ray has the sys.path of the process that started the sweep."""
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    from pipeline.build.ray import driver as build_driver
    from train.sweep.ray import cluster, driver

    (project / "probe.pickle").write_bytes(cloudpickle.dumps(cluster._remote_probe()))
    (project / "token").write_text("1f")
    call = "import pickle\nfound = pickle.load(open('probe.pickle', 'rb'))('.', '1f')\nprint(found['sees_folder'])"
    assert forked_python(call).stdout == "True\n"
    (project / "trainable.pickle").write_bytes(cloudpickle.dumps(driver._trainable()))
    call = "import pickle\npickle.load(open('trainable.pickle', 'rb'))({'share': 0}, shares=['{}'])"
    assert "validation errors for Share" in forked_python(call, check=False).stderr
    (project / "builder.pickle").write_bytes(cloudpickle.dumps(build_driver._worker_class()))
    call = "import pickle\nprint(pickle.load(open('builder.pickle', 'rb')).__name__)"
    assert forked_python(call).stdout == "CacheBuilder\n"


@pytest.mark.medium
def test_plugins_import_our_packages(forked_python: Python) -> None:
    places = [place.partition(":") for place in POINTS.values()]
    code = "import importlib\n" + "\n".join(
        f"print(getattr(importlib.import_module({module!r}), {name!r}).__module__)" for module, _, name in places
    )
    assert set(forked_python(code).stdout.split()) == {
        "pipeline.networks.prompts",
        "pipeline.networks.stored",
        "pipeline.replay",
        "train.runs.student",
    }
