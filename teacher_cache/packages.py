"""Make `cache_tools`, `train` and `pipeline` mean the packages of teacher-cache.

Python takes the first module of a name on `sys.path`. In a script or notebook beside a `train.py`, and everywhere with
`PYTHONPATH=.`, that is the user's file. An import hook that runs before `sys.path` is searched answers for a package of
ours, once it was asked for. A name that nobody asked for is left to the user: `from teacher_cache import TeacherCache`
and `import train` of one's own file work together.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Each with the packages that it imports.
NEEDS = {
    "cache_tools": ("cache_tools",),
    "train": ("cache_tools", "train"),
    "pipeline": ("cache_tools", "train", "pipeline"),
    "teacher_cache": ("cache_tools", "train"),
}


class ShadowedError(ImportError):
    """A module of the user, already imported, has the name of a package of teacher-cache."""


class OwnPackages:
    """An import hook that finds the packages in `names` in ROOT, and nothing else."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [ROOT]) if fullname in self.names else None


_finder = OwnPackages()


def import_own(module: str, name: str) -> Any:
    """An attribute or a submodule of a module of ours.

    Raises:
        ShadowedError: a module of the user is already imported under the name of our package.
    """
    claim(module.partition(".")[0])
    own = importlib.import_module(module)
    return getattr(own, name) if hasattr(own, name) else importlib.import_module(f"{module}.{name}")


def claim(package: str, *, evict: bool = False) -> None:
    """From now on, imports of a package, and of the packages that it needs, find ours.

    Args:
        evict: forget modules of the user that are already imported under these names. For commands only, in which
            nothing else needs them.

    Raises:
        ShadowedError: such a module without `evict`.
    """
    names = NEEDS[package]
    for name in names:
        module = sys.modules.get(name)
        if module is None or _is_own(module, name):
            continue
        if not evict:
            raise ShadowedError(
                f"{_location(module)} is imported as `{name}`, and teacher_cache needs its own package of that name: "
                f"rename this file or folder, or import from teacher_cache first",
                name=name,
                path=_location(module),
            )
        for imported in [key for key in sys.modules if key.partition(".")[0] == name]:
            del sys.modules[imported]
    _finder.names.update(names)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _is_own(module: ModuleType, name: str) -> bool:
    try:
        return os.path.samefile(_location(module), os.path.join(ROOT, name, "__init__.py"))
    except OSError:
        return False


def _location(module: ModuleType) -> str:
    """The file of a module, or the first folder of a package without `__init__.py`."""
    return getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), "a module without a file")
