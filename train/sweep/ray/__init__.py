"""Train the trials of a sweep on a Ray cluster."""

from __future__ import annotations

import importlib.util

from cache_tools.errors import RecipeError

_PACKAGES = ("ray", "pandas", "pyarrow", "fsspec")  # of ray[tune]


def require_ray() -> None:
    """Raise RecipeError where Ray is not installed. Imports nothing slow."""
    if any(importlib.util.find_spec(package) is None for package in _PACKAGES):
        raise RecipeError(
            "the engine 'ray' needs a package that is not installed",
            where="--engine ray",
            next_step="install it: pip install 'teacher-cache[ray]'",
        )
