"""The folder of a run: the names of its files, the recipe it belongs to, and the lock that keeps it to one process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cache_tools.errors import DataError, RecipeError, StorageError
from cache_tools.files import SafeFolder, is_partial
from train.checkpoints import BEST, EMA, LAST
from train.recipe import TrainRecipe
from train.recipe.loading import DEFAULT_RECIPE
from train.recipe.student_names import canonical_student_name
from train.weights import run_files as files_below
from train.weights.run_files import read_json, run_files, write_file

RECIPE, IDENTITY, CACHE = "recipe.yaml", files_below.IDENTITY, "cache.json"
STATE, CHECKPOINT = "state.pt", "checkpoint.pt"  # after the last finished epoch; inside the next one
METRICS, CURVES, RESULT = "metrics.parquet", "curves.png", "result.json"
PREDICTIONS, REPORT = "test.parquet", "report.html"
BOARD, TRACKERS, LABELS_ONLY = "tb", "trackers.json", files_below.LABELS_ONLY
EVALUATION, EXPORT = "evaluation", "export"  # folders of `evaluate-student` and `export-student`
EVALUATION_FILES = ("evaluation.json", "confusion.parquet", "confusion.png", "robustness.parquet", "robustness.png")
EXPORT_FILES = ("config.json", "model.safetensors", "model.torchscript.pt", "model.pt2", "model.onnx")
FAILED, STOPPED = "failed.json", "stopped.json"  # of a trial of a sweep that ended without a result
LOCK = ".lock"
MAX_EPOCHS = 10_000_000  # of a stored run

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
_FOLDERS = (BOARD, LABELS_ONLY, EVALUATION, EXPORT)


class _IdentitySchedule(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    warmup_epochs: int = Field(0, ge=0, le=MAX_EPOCHS)
    milestones: list[int] | None = Field(None, max_length=1000)


class _IdentityRecipe(BaseModel):
    """The keys of a stored recipe that reports and sweeps compute with; the others are only compared."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    student: str = Field(max_length=1000)
    epochs: int = Field(1, ge=1, le=MAX_EPOCHS)
    label_fraction: float | None = Field(None, ge=1e-6, le=1.0)
    num_views: int | None = None
    dataset: dict[str, Any] | None = None
    schedule: _IdentitySchedule | None = None


class _Identity(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    recipe: _IdentityRecipe
    data: dict[str, str]

    @field_validator("data")
    @classmethod
    def _counts_views(cls, data: dict[str, str]) -> dict[str, str]:
        if not re.fullmatch(r"None|[0-9]{1,12}", data.get("num_views", "None")):
            raise ValueError("num_views is a number, or None")
        return data


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
        FormatError: a link, pipe or device where a file or folder of the run should be.
    """
    _refuse_other_folder(folder)
    _make(folder)
    with _locked(folder):
        _refuse_unsafe(folder)
        stored = stored_identity(folder)
        if overwrite or (stored != identity and not is_worth_keeping(folder)):
            _clear(folder, keep_identity=True)  # replaced below: at no moment is the folder without one
        elif stored != identity:
            raise RecipeError(
                "another run is stored here",
                where=folder,
                expected="the same recipe and data",
                found="; ".join(differences(stored, identity)),
                next_step="choose another --out, or start over with --overwrite",
            )
        run_files(folder).remove_partials(age_s=0.0)  # left by a killed process
        if stored != identity:
            write_file(folder / IDENTITY, json.dumps(identity, indent=2, ensure_ascii=False).encode())
        yield


def stored_identity(folder: Path) -> dict[str, Any] | None:
    """The `identity` that `claimed` stored in a folder; None if there is none, or a damaged one."""
    try:
        return read_identity(folder)
    except DataError:
        return None


def read_identity(folder: Path) -> dict[str, Any] | None:
    """As `stored_identity`; raises DataError for a damaged one."""
    file = folder / IDENTITY
    try:
        stored = read_json(file)
        if stored is None:
            return None
        _Identity.model_validate(stored)
    except ValueError as error:
        raise DataError(
            "damaged record of a run", where=file, expected="recipe and data", found=str(error).partition("\n")[0]
        ) from error
    recipe = stored["recipe"]
    student = canonical_student_name(recipe["student"])  # earlier versions stored the name as it was typed
    return {**stored, "recipe": {**recipe, "student": student}}


def is_worth_keeping(folder: Path) -> bool:
    """Whether a folder has a run to resume or a finished one, which another run replaces only with `overwrite`."""
    return any(run_files(folder).exists(name) for name in (CHECKPOINT, STATE, RESULT))


def remove_run(folder: Path) -> None:
    """Remove the run in a folder.

    Raises:
        StorageError: another process is writing here.
        FormatError: a link, pipe or device where a file or folder of the run should be.
    """
    with _locked(folder):
        _refuse_unsafe(folder)
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
    with ExitStack() as stack:
        try:
            stack.enter_context(run_files(folder).lock(LOCK))
        except BlockingIOError as error:
            raise StorageError(
                "another process is training in this folder", where=folder, next_step="choose another --out"
            ) from error
        yield


def _make(folder: Path) -> None:
    try:
        run_files(folder).make_folder()
    except FileExistsError as error:
        raise StorageError(
            "a link that leads nowhere is where the run folder should be",
            where=folder,
            next_step="remove the link, or choose another --out",
        ) from error


def _refuse_other_folder(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StorageError("a file is where the run folder should be", where=folder, next_step="choose another --out")
    names = run_files(folder).names()
    if IDENTITY in names or all(name.startswith(".") or is_partial(name) for name in names):
        return
    if not set(names) & set(_FILES):  # else a removal was interrupted
        raise RecipeError("this folder holds something else than a run", where=folder, next_step="choose another --out")


def _refuse_unsafe(folder: Path) -> None:
    """Refuse a link, pipe or device in place of a file or folder of a run now, and not after hours of training."""
    files = run_files(folder)
    check_derived(files, (name for name in files.names() if name in _FILES))
    for name in _FOLDERS:
        if files.exists(name):
            files.names(name)  # raises for anything else than a folder
    if files.exists(LABELS_ONLY):
        _refuse_unsafe(folder / LABELS_ONLY)


def _clear(folder: Path, *, keep_identity: bool = False) -> None:
    """Remove the files of a run, its evaluation and its export, and nothing else.

    The identity is the last to go: until then the folder is known as a run, and the next command can finish a removal.
    """
    files = run_files(folder)
    for name in _FILES:
        if name != IDENTITY:
            files.remove(name)
    for derived, names in ((EVALUATION, EVALUATION_FILES), (EXPORT, EXPORT_FILES)):
        remove_derived(files.below(derived), names)
    board = files.below(BOARD)
    for entry in board.entries() if files.is_folder(BOARD) else ():
        if entry.is_file and entry.name.startswith("events.out.tfevents."):
            board.remove(entry.name)
    twin = folder / LABELS_ONLY
    if files.is_folder(LABELS_ONLY) and (stored_identity(twin) is not None or run_files(twin).exists(RESULT)):
        _clear(twin)
    for empty in (BOARD, LABELS_ONLY):
        files.remove_empty(empty)
    if not keep_identity:
        files.remove(IDENTITY)


def check_derived(files: SafeFolder, names: Iterable[str]) -> None:
    """Refuse links, pipes, devices and folders in place of files that a command will write, before its work."""
    for name in names:
        if files.exists(name):
            files.open_read(name).close()  # raises for anything else than a file


def remove_derived(files: SafeFolder, names: Iterable[str]) -> None:
    """Remove files of these names from a folder, what killed processes left there, and the folder if it is empty."""
    try:
        found = files.entries()
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        files.remove(name)
    files.remove_partials(age_s=0.0)
    for entry in found:
        if entry.is_folder and is_partial(entry.name):
            files.remove_tree(entry.name)
    files.remove_empty()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"
