"""The entry points of the group `teacher_cache.plugins` (`cache_tools.plugins`), each imported on first use."""

from __future__ import annotations

from typing import Any

_MODULES = {
    "template_set": "pipeline.networks.prompts",
    "text_features": "pipeline.networks.stored",
    "replay": "pipeline.replay",
    "open_student": "train.runs.student",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from teacher_cache.packages import import_own

    return import_own(_MODULES[name], name)
