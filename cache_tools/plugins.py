"""What needs a network, found by name: `cache_tools` runs no model, but some of its commands have work for one.

Entry points of the group `teacher_cache.plugins`; this package declares those of `pipeline` (pyproject.toml):

| name | function |
|---|---|
| `templates` | `(name_or_file) -> tuple of prompt templates` |
| `text-features` | `(manifest, templates, device) -> float32 [P, C, D] of each CLIP`, checked against its identity |
| `replay` | `(cache, images, …) -> Replay`: rows computed again with the teachers, compared with the stored ones |
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from cache_tools.errors import NotFoundError

GROUP = "teacher_cache.plugins"


def load(name: str) -> Any:
    """The function that is installed under `name`.

    Raises:
        NotFoundError: nothing of that name is installed, or what it needs is missing.
    """
    found = entry_points(group=GROUP, name=name)
    if not found:
        installed = sorted({point.name for point in entry_points(group=GROUP)})
        raise NotFoundError(
            "this needs a network, and the plugin that runs it is not installed",
            where=f"{GROUP}: {name}",
            expected="the package pipeline of teacher-cache",
            found=", ".join(installed) or "no plugins",
            next_step="install teacher-cache anew, with pip, from where you have it",
        )
    point = next(iter(found))
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise NotFoundError(
            "a plugin cannot be imported",
            where=f"{GROUP}: {name} = {point.value}",
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            next_step="install teacher-cache anew, with pip, from where you have it",
        ) from error
