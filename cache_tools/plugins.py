"""Functions that run a network, found by name: `cache_tools` itself runs none, but some of its commands need one.

They are entry points of the group `teacher_cache.plugins`. pyproject.toml declares those of `pipeline` and `train`:

| name | function |
|---|---|
| `templates` | `(name_or_file) -> tuple of prompt templates` |
| `text-features` | `(manifest, templates, device) -> float32 [P, C, D] of each CLIP`, checked against its identity |
| `replay` | `(cache, images, …) -> Replay`: rows computed again with the teachers, compared with the stored ones |
| `student` | `(run, class_names, view_size, device) -> Student`: a trained student that gives logits of views |
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from cache_tools.errors import NotFoundError

GROUP = "teacher_cache.plugins"


def load(name: str) -> Any:
    """Import the function that is installed under `name`.

    Raises:
        NotFoundError: no plugin of that name is installed, or its import fails.
    """
    points = entry_points(group=GROUP, name=name)
    if not points:
        installed = sorted({point.name for point in entry_points(group=GROUP)})
        raise NotFoundError(
            "the plugin that runs this network is not installed",
            where=f"{GROUP}: {name}",
            expected="the packages pipeline and train of teacher-cache",
            found=", ".join(installed) or "no plugins",
            next_step="reinstall teacher-cache with pip",
        )
    point = next(iter(points))
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise NotFoundError(
            "a plugin cannot be imported",
            where=f"{GROUP}: {name} = {point.value}",
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            next_step="reinstall teacher-cache with pip",
        ) from error
