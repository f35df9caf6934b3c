"""Build a cache: run the teachers once and store fused targets, block by block."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.build.cache import BuildResult, build_cache

__all__ = ["BuildResult", "build_cache"]
_MODULES = {"BuildResult": "cache", "build_cache": "cache"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the commands of this package must start fast."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
