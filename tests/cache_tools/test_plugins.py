import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from cache_tools import plugins
from cache_tools.errors import NotFoundError

ROOT = Path(__file__).parents[2]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][plugins.GROUP]


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_declared_plugins_are_installed_and_callable(name: str) -> None:
    function = plugins.load(name)
    assert callable(function)
    assert function is EntryPoint(name, DECLARED[name], plugins.GROUP).load()


def test_the_docstring_lists_the_declared_plugins() -> None:
    assert plugins.__doc__ is not None
    assert {line.split("`")[1] for line in plugins.__doc__.splitlines() if line.startswith("| `")} == set(DECLARED)


def test_an_unknown_plugin_is_reported() -> None:
    with pytest.raises(NotFoundError, match=r"not installed \(teacher_cache.plugins: telepathy\).*templates.*with pip"):
        plugins.load("telepathy")


@pytest.mark.parametrize("value", ["no_such_package.module:function", "cache_tools.errors:no_such_function"])
def test_a_plugin_whose_import_fails_is_reported(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    broken = EntryPoints([EntryPoint("replay", value, plugins.GROUP)])
    monkeypatch.setattr(plugins, "entry_points", lambda **wanted: broken.select(**wanted))
    with pytest.raises(NotFoundError, match=rf"cannot be imported \(.*replay = {value}\).*no_such.*with pip"):
        plugins.load("replay")


def test_importing_plugins_imports_no_network() -> None:
    code = "import sys; import cache_tools.plugins; print('torch' in sys.modules or 'pipeline' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
