"""Folders that our own commands write: they may lie among the images, and none of their pictures is a sample."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

# The names that only such a folder holds → its kind in singular and plural.
_KINDS = {
    frozenset({"zarr.json"}): ("cache", "caches"),
    frozenset({"run.json"}): ("run of train-student", "runs of train-student"),
    frozenset({"sweep.yaml"}): ("sweep of sweep-students", "sweeps of sweep-students"),
    frozenset({"evaluation.json"}): ("evaluation of a student", "evaluations of students"),
    frozenset({"stats.json", "views"}): ("analysis of a cache", "analyses of caches"),
}
_PLURALS = dict(_KINDS.values())
RESULT_FOLDERS = frozenset(_PLURALS)


def result_folder_kind(names: Collection[str]) -> str | None:
    """Which kind of `RESULT_FOLDERS` a folder with these files and sub-folders is; None for any other folder."""
    return next((kind for marks, (kind, _) in _KINDS.items() if all(name in names for name in marks)), None)


def has_result_folder(folder: Path) -> bool:
    """Whether a folder is one that our commands write, or one of its sub-folders is."""
    folders = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    return any(all(os.path.exists(path / name) for name in marks) for path in folders for marks in _KINDS)


def count_result_folders(count: int, kind: str) -> str:
    """Such as `1 cache` or `2 caches`."""
    return f"{count:,} {kind if count == 1 else _PLURALS[kind]}"
