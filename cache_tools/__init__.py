"""Read a teacher cache in the training loop of any project:

    from cache_tools import TeacherCache
    cache = TeacherCache.open("digits")
    targets = cache.load_view(0)

Heavy modules are imported on first use, to keep `cache-tools ls` and every `--help` fast.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["CacheError", "TeacherCache", "ViewTargets", "__version__"]

if TYPE_CHECKING:
    from cache_tools.errors import CacheError
    from cache_tools.reader import TeacherCache, ViewTargets

    __version__: str


def __getattr__(name: str) -> Any:
    if name == "CacheError":
        from cache_tools.errors import CacheError

        return CacheError
    if name == "__version__":
        from importlib.metadata import version

        return version("teacher-cache")
    if name in {"TeacherCache", "ViewTargets"}:
        from cache_tools import reader

        return getattr(reader, name)
    raise AttributeError(f"module 'cache_tools' has no attribute {name!r}")
