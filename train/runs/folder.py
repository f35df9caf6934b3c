"""The folder of a run: the names of its files, the recipe it belongs to, and the lock that keeps it to one process."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache_tools.errors import RecipeError, StorageError
from cache_tools.files import PARTIAL, put_durably
from train.checkpoints import BEST, EMA, LAST
from train.recipe import TrainRecipe
from train.recipe.loading import DEFAULT_RECIPE
from train.recipe.student_names import canonical_student_name

RECIPE, IDENTITY, CACHE = "recipe.yaml", "run.json", "cache.json"
STATE, CHECKPOINT = "state.pt", "checkpoint.pt"  # after the last finished epoch; inside the next one
METRICS, CURVES, RESULT = "metrics.parquet", "curves.png", "result.json"
PREDICTIONS, REPORT = "test.parquet", "report.html"
BOARD, TRACKERS, LABELS_ONLY = "tb", "trackers.json", "labels-only"
EVALUATION, EXPORT = "evaluation", "export"  # folders of `evaluate-student` and `export-student`
FAILED, STOPPED = "failed.json", "stopped.json"  # of a trial of a sweep that ended without a result

# In the order of removal: first what a run resumes from, so that an interrupted removal leaves nothing to resume.
_FILES = (
    *(
        RESULT,
        FAILED,
        STOPPED,
        CHECKPOINT,
        STATE,
        IDENTITY,
        RECIPE,
        CACHE,
        METRICS,
        TRACKERS,
        CURVES,
        PREDICTIONS,
        REPORT,
    ),
    *(LAST, BEST, EMA),
)


def run_folder(recipe: TrainRecipe, digest: str) -> Path:
    """`out`, or `runs/NAME-STUDENT-LOSS-DIGEST`: every recipe has a folder of its own.

    Earlier versions named a run after the default recipe where only a cache was given. Such a run is continued there.
    """
    if recipe.out is not None:
        return recipe.out
    parts = (recipe.name, recipe.student, recipe.loss_name, digest[:8])
    folder, earlier = (
        Path("runs") / "-".join(re.sub(r"[^A-Za-z0-9._+-]+", "_", part) for part in (name, *parts[1:]))
        for name in (recipe.name, DEFAULT_RECIPE)
    )
    return earlier if earlier.is_dir() and not folder.exists() else folder


@contextmanager
def claimed(folder: Path, identity: Mapping[str, Any], *, overwrite: bool) -> Iterator[None]:
    """Create a run folder, or enter one of the same recipe, and keep other processes out until the end.

    Args:
        identity: everything that determines the result, as plain data.
        overwrite: first remove any earlier run from the folder.

    Raises:
        RecipeError: the folder holds a run of another recipe, or something else than a run.
        StorageError: another process is writing in the folder.
    """
    _refuse_other_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        stored = stored_identity(folder)
        if overwrite or (stored != identity and not is_worth_keeping(folder)):
            _clear(folder)
        elif stored != identity:
            raise RecipeError(
                "another run is stored here",
                where=folder,
                expected="the same recipe and data",
                found="; ".join(differences(stored, identity)),
                next_step="choose another --out, or start over with --overwrite",
            )
        for leftover in folder.glob(f"*{PARTIAL}"):  # left by a killed process
            leftover.unlink(missing_ok=True)
        if not (folder / IDENTITY).exists():
            put_durably(folder / IDENTITY, json.dumps(identity, indent=2, ensure_ascii=False).encode())
        yield


def stored_identity(folder: Path) -> dict[str, Any] | None:
    """The `identity` that `claimed` stored in a folder; None if there is none, or a damaged one."""
    try:
        stored = json.loads((folder / IDENTITY).read_bytes())
        recipe = stored["recipe"]
        student = canonical_student_name(recipe["student"])  # earlier versions stored the name as it was typed
        return {**stored, "recipe": {**recipe, "student": student}, "data": {**stored["data"]}}
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, AttributeError):
        return None


def is_worth_keeping(folder: Path) -> bool:
    """Whether a folder has a run to resume or a finished one, which another run replaces only with `overwrite`."""
    return any((folder / name).exists() for name in (CHECKPOINT, STATE, RESULT))


def remove_run(folder: Path) -> None:
    """Remove the run in a folder.

    Raises:
        StorageError: another process is writing here.
    """
    with _locked(folder):
        _clear(folder)


def differences(stored: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> list[str]:
    """One line for each key in which a stored identity differs from the wanted one."""
    if stored is None:
        return [f"its {IDENTITY} is missing or damaged"]
    before, now = flatten(stored), flatten(wanted)
    return [
        f"{key} {_short(before.get(key))} there, {_short(now.get(key))} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    plain: dict[str, Any] = {}
    for key, value in data.items():
        plain |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return plain


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an advisory lock, which the system releases when the process ends in any way."""
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


def _refuse_other_folder(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StorageError("a file is where the run folder should be", where=folder, next_step="choose another --out")
    if not (folder / IDENTITY).exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        if any((folder / name).exists() for name in _FILES):
            return  # a removal was interrupted
        raise RecipeError("this folder holds something else than a run", where=folder, next_step="choose another --out")


def _clear(folder: Path) -> None:
    """Remove the files of a run, its evaluation and its export, and nothing else."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for derived in (EVALUATION, EXPORT):
        shutil.rmtree(folder / derived, ignore_errors=True)
    for events in (folder / BOARD).glob("events.out.tfevents.*"):
        events.unlink(missing_ok=True)
    twin = folder / LABELS_ONLY
    if twin.is_dir() and (stored_identity(twin) is not None or (twin / RESULT).exists()):
        _clear(twin)
    for empty in (folder / BOARD, twin):
        with contextlib.suppress(OSError):
            empty.rmdir()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"
