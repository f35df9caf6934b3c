"""teacher_cache: our packages are found beside a user's train.py, pipeline/ and cache_tools.py."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

import teacher_cache
from teacher_cache import packages
from tests.support.turns import slow
from tests.teacher_cache.conftest import ROOT, Python

FILES = "print(*(sys.modules[name].__file__ for name in ('cache_tools', 'train', 'pipeline') if name in sys.modules))"


@pytest.fixture
def finder(monkeypatch: pytest.MonkeyPatch) -> packages.OwnPackages:
    """A fresh finder, and imports that are as before at the end."""
    fresh = packages.OwnPackages()
    monkeypatch.setattr(packages, "_finder", fresh)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return fresh


@pytest.mark.medium
@pytest.mark.parametrize("way", [slow("script"), "notebook"])
def test_public_names_import_beside_modules_of_the_same_names(
    python: Python, forked_python: Python, project: Path, way: str
) -> None:
    code = "import sys\nfrom teacher_cache import TeacherCache, create_student, losses, build_cache\n" + FILES
    code += "\nprint(create_student('resnet8', 10).num_features, losses.kd.__module__, TeacherCache.__module__)"
    (project / "train_it.py").write_text(code)
    done = python("train_it.py") if way == "script" else forked_python(code)  # -c: '' on sys.path, as in a notebook
    files, names = done.stdout.splitlines()
    assert files.split() == [str(ROOT / name / "__init__.py") for name in ("cache_tools", "train", "pipeline")]
    assert names.split() == ["64", "train.losses.functions", "cache_tools.reader"]
    assert done.stderr == ""


@pytest.mark.medium
def test_a_script_may_itself_be_called_train(python: Python, project: Path) -> None:
    (project / "train.py").write_text("from teacher_cache import CacheError, ViewRecipe, codecs\nprint('trained')\n")
    assert python("train.py").stdout == "trained\n"


@pytest.mark.medium
def test_reading_a_cache_leaves_train_and_pipeline_to_the_user(python: Python) -> None:
    code = "import pipeline\nfrom teacher_cache import TeacherCache\nimport train\nprint(train.owner, pipeline.owner)"
    assert python("-c", code).stdout == "user user\n"


@pytest.mark.medium
@pytest.mark.parametrize(
    ("theirs", "ours"), [("train", "losses"), ("pipeline", "build_cache"), ("cache_tools", "fusion")]
)
def test_a_module_of_the_user_that_came_first_is_named_in_one_line(
    python: Python, project: Path, theirs: str, ours: str
) -> None:
    done = python("-c", f"import {theirs}\nfrom teacher_cache import {ours}", check=False)
    file = project / ("pipeline/__init__.py" if theirs == "pipeline" else f"{theirs}.py")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"teacher_cache.packages.ShadowedError: {file} is imported as `{theirs}`, and teacher_cache")
    assert last.endswith("rename this file or folder, or import from teacher_cache first")


@pytest.mark.parametrize("package", ["train", "pipeline"])
def test_a_folder_without_init_is_named(
    finder: packages.OwnPackages, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = ModuleType(package)
    theirs.__path__ = ["/home/me/project/" + package]
    monkeypatch.setitem(sys.modules, package, theirs)
    with pytest.raises(packages.ShadowedError, match=f"^/home/me/project/{package} is imported"):
        packages.claim(package)
    assert finder.names == set()
    assert finder not in sys.meta_path


def test_commands_forget_what_is_already_imported(finder: packages.OwnPackages) -> None:
    importlib.import_module("cache_tools.errors")
    for name in ("train", "train.models", "pipeline"):
        sys.modules[name] = ModuleType(name)
    packages.claim("pipeline", evict=True)
    assert not {"train", "train.models", "pipeline"} & sys.modules.keys()
    assert "cache_tools.errors" in sys.modules, "ours stay"
    assert sys.meta_path.count(finder) == 1
    packages.claim("train")
    assert sys.meta_path.count(finder) == 1


def test_only_claimed_names_are_found(finder: packages.OwnPackages) -> None:
    assert finder.find_spec("train", None) is None
    packages.claim("train")
    found = finder.find_spec("train", None)
    assert found is not None
    assert found.origin == str(ROOT / "train/__init__.py")
    assert [finder.find_spec(name, None) for name in ("pipeline", "train.loop", "tests")] == [None, None, None]


def test_every_public_name_can_be_imported() -> None:
    assert {name: getattr(teacher_cache, name) for name in teacher_cache.__all__}.keys() == packages_of_names().keys()
    assert set(teacher_cache.__all__) <= set(dir(teacher_cache))
    with pytest.raises(ImportError, match="cannot import name 'TeacherCash'"):
        exec("from teacher_cache import TeacherCash")


def packages_of_names() -> dict[str, str]:
    return {name: module for name, module in teacher_cache._MODULES.items() if name in teacher_cache.__all__}


@pytest.mark.medium
def test_import_is_fast(python: Python) -> None:
    done = python(
        "-c", "import sys, teacher_cache; print(sorted({'torch', 'numpy', 'typer', 'train'} & set(sys.modules)))"
    )
    assert done.stdout == "[]\n"
