"""Why a trial of a sweep has no result."""

from __future__ import annotations

from pathlib import Path

from cache_tools.config import Frozen

FAILED = "failed.json"


class Failure(Frozen):
    """Why a trial has no result; `failed.json` in its folder. Remove that file to have it tried again."""

    kind: str
    message: str


def load_failure(folder: Path) -> Failure | None:
    """What stopped a trial, None if nothing did."""
    try:
        return Failure.model_validate_json((folder / FAILED).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
