"""The folder of a run: which recipe owns it, who is writing in it, and what there is to go on from."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache_tools.errors import RecipeError, StorageError
from cache_tools.files import PARTIAL, put_durably
from train.checkpoints import BEST, EMA, LAST
from train.recipe import canonical_student_name

RECIPE, IDENTITY, CACHE = "recipe.yaml", "run.json", "cache.json"
STATE, METRICS, CURVES, RESULT = "state.pt", "metrics.parquet", "curves.png", "result.json"
PREDICTIONS, REPORT = "test.parquet", "report.html"
BOARD, TRACKERS, LABELS_ONLY = "tb", "trackers.json", "labels-only"
EVALUATION, EXPORT = "evaluation", "export"  # what `evaluate-student` and `export-student` leave there
FAILED, STOPPED = "failed.json", "stopped.json"  # how a trial of a sweep ended without a result

# What a new start must not find goes first, so that an interrupted clearing leaves nothing to resume from.
_FILES = (
    *(RESULT, FAILED, STOPPED, STATE, IDENTITY, RECIPE, CACHE, METRICS, TRACKERS, CURVES, PREDICTIONS, REPORT),
    *(LAST, BEST, EMA),
)


@contextmanager
def claimed(folder: Path, identity: Mapping[str, Any], *, overwrite: bool) -> Iterator[None]:
    """Make a run folder, or enter one of the same recipe, and keep other processes out until the end.

    Args:
        identity: everything that determines the result, as plain data.
        overwrite: forget what an earlier run left here, whatever its recipe.

    Raises:
        RecipeError: a run of another recipe is stored here, or the folder holds something else.
        StorageError: another process is writing here.
    """
    _refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        stored = stored_identity(folder)
        if overwrite or (stored != identity and not worth_keeping(folder)):
            _clear(folder)
        elif stored != identity:
            raise RecipeError(
                "another run is stored here",
                where=folder,
                expected="the same recipe and data",
                found="; ".join(differences(stored, identity)),
                next_step="choose another --out, or start over with --overwrite",
            )
        for leftover in folder.glob(f"*{PARTIAL}"):  # of a killed process
            leftover.unlink(missing_ok=True)
        if not (folder / IDENTITY).exists():
            put_durably(folder / IDENTITY, json.dumps(identity, indent=2, ensure_ascii=False).encode())
        yield


def stored_identity(folder: Path) -> dict[str, Any] | None:
    """What determines the result of the run in a folder (`claimed`); None if there is none, or if it is damaged."""
    try:
        stored = json.loads((folder / IDENTITY).read_bytes())
        recipe = stored["recipe"]
        student = canonical_student_name(recipe["student"])  # as it was typed, before names had one spelling
        return {**stored, "recipe": {**recipe, "student": student}, "data": {**stored["data"]}}
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, AttributeError):
        return None


def worth_keeping(folder: Path) -> bool:
    """Whether a folder has a run that a new one must not replace unasked: a finished epoch at least."""
    return (folder / STATE).exists() or (folder / RESULT).exists()


def forget(folder: Path) -> None:
    """Remove the run in a folder.

    Raises:
        StorageError: another process is writing here.
    """
    with _alone(folder):
        _clear(folder)


def differences(stored: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> list[str]:
    """What a stored identity (`stored_identity`) and the one that is wanted do not have in common, a line each."""
    if stored is None:
        return [f"its {IDENTITY} is missing or damaged"]
    before, now = flat(stored), flat(wanted)
    return [
        f"{key} {_short(before.get(key))} there, {_short(now.get(key))} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    plain: dict[str, Any] = {}
    for key, value in data.items():
        plain |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return plain


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """An advisory lock that the system releases with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
                raise StorageError(
                    "another process is training in this folder", where=folder, next_step="choose another --out"
                ) from error
            # else: a file system without locks
        yield


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StorageError("a file is where the run folder should be", where=folder, next_step="choose another --out")
    if not (folder / IDENTITY).exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        if any((folder / name).exists() for name in _FILES):
            return  # a clearing that was interrupted
        raise RecipeError("this folder holds something else than a run", where=folder, next_step="choose another --out")


def _clear(folder: Path) -> None:
    """Remove what a run writes and what was made of its weights, and nothing else."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for made_of_it in (EVALUATION, EXPORT):
        shutil.rmtree(folder / made_of_it, ignore_errors=True)
    for events in (folder / BOARD).glob("events.out.tfevents.*"):
        events.unlink(missing_ok=True)
    twin = folder / LABELS_ONLY
    if twin.is_dir() and (stored_identity(twin) is not None or (twin / RESULT).exists()):
        _clear(twin)
    for emptied in (folder / BOARD, twin):
        with contextlib.suppress(OSError):
            emptied.rmdir()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"
