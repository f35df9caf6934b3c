"""The result of a run, and its summary as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from cache_tools.config import Frozen
from cache_tools.errors import FormatError, WeightsError, printable
from cache_tools.format.recipe import Finite, Preprocessing
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice
from cache_tools.screen import TextTable, nats
from cache_tools.units import counted, duration
from train.evaluate.multilabel import HEADLINES, Figures, MultiLabelEvaluation
from train.recipe.loss import LABELS_ALONE
from train.runs.folder import MAX_EPOCHS, REPORT, RESULT
from train.weights.run_files import read_file, write_file

_MEASURED = {"teacher_top1": "teacher", "clip_top1": "CLIP", "fusion_top1": "fusion", "teacher_map": "teacher"}
_ROWS = {"fusion": "teacher + CLIP, fused"}


def _checked_figures(figures: dict[str, Any] | None) -> dict[str, Any] | None:
    """The figures of a preflight. Raises ValueError for other types than `figures_of_teachers` and a summary show."""
    for key in _MEASURED:
        value = (figures or {}).get(key)
        if value is not None and not (isinstance(value, int | float) and 0.0 <= value <= 1.0):
            raise ValueError(f"{key} is not a number from 0 to 1")
    n, split = (figures or {}).get("n", 0), (figures or {}).get("split", "")
    if type(n) is not int or not 0 <= n < 1 << 53:
        raise ValueError("n is not a number of images")
    if not isinstance(split, str):
        raise ValueError("split is not a name")
    return figures


Count = Annotated[int, Field(ge=0, lt=1 << 53)]


class SplitResult(Frozen):
    """The figures of a run on a further test split, of the weights that `RunResult` has figures of."""

    last: Figures | None
    best: Figures | None = None
    ema: Figures | None = None


class RunResult(Finite):
    """The result of a run, stored as `result.json` in its folder.

    Attributes:
        folder: of the run.
        last, best, ema: figures on the test split of the last weights, of those with the highest test top-1 (mAP with
            several labels) of all epochs (selected on the test set, as papers do, so the figure is optimistic), and of
            the averaged weights.
        average_precision: of each class that the test split has, with the last weights; empty for single labels.
        more_tests: figures on further test splits, by split; those of `best` are at the best epoch of the first split.
        test_preprocessing: how test images were prepared; None in results of earlier versions.
        teachers: top-1 of teacher, CLIP and fusion, measured by the cache's preflight (see `figures_of_teachers`).
        labels_only: the same run on labels alone.
        notes: what a reader of the figures should know, such as classes without test images.
        train_s: seconds spent in training steps, also before a resume; without opening, evaluation and writing.
        environment: versions, device, threads.
        command: the last command line.
        data_notes: what a user should know of the folders of images, such as files that are left out.
        pixels: where the pixels of the training images were, when the last epoch was trained.
    """

    name: str
    student: str
    parameters: Count
    loss: str
    epochs: Annotated[int, Field(ge=0, le=MAX_EPOCHS)]
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]
    folder: Path
    recipe_digest: str
    fingerprint: str | None
    train_samples: Count
    test_split: str | None
    last: Figures | None
    best: Figures | None
    best_epoch: Count | None
    ema: Figures | None = None
    average_precision: dict[str, float] = Field(default_factory=dict)
    more_tests: dict[str, SplitResult] = Field(default_factory=dict)
    test_preprocessing: Preprocessing | None = None
    teachers: Annotated[dict[str, Any] | None, AfterValidator(_checked_figures)] = None
    labels_only: RunResult | None = None
    notes: tuple[str, ...] = ()
    train_s: Annotated[float, Field(ge=0.0, le=1e12)]
    environment: dict[str, str]
    command: str
    data_notes: tuple[str, ...] = ()
    pixels: str | None = None

    @property
    def gain_over_labels(self) -> float | None:
        """Top-1 or mAP minus that of the same student on labels alone, last epoch; None if one of them is not known."""
        twin = self.labels_only
        return None if twin is None or not twin.last or not self.last else self.last.headline - twin.last.headline

    def save(self) -> None:
        write_file(self.folder / RESULT, self.model_dump_json(indent=2).encode())


def load_result(folder: Path) -> RunResult | None:
    """Load the result of a run; None if the run is not finished.

    Raises:
        WeightsError: a damaged file.
    """
    text = read_file(folder / RESULT)
    if text is None:
        return None
    try:
        result = RunResult.model_validate_json(text)
    except ValueError as error:
        raise WeightsError(
            "damaged result", where=folder / RESULT, next_step="start this run again with --overwrite"
        ) from error
    return result.model_copy(update={"folder": folder})


def figures_of_teachers(preflight: Mapping[str, Any] | None) -> dict[str, float]:
    """The top-1 of `teacher`, `CLIP` and `fusion` in a cache's preflight; those that were not measured are left out.

    For images with several labels it is the mean average precision of `teacher`.
    """
    found = preflight or {}
    return {name: found[key] for key, name in _MEASURED.items() if found.get(key) is not None}


def kept_figures(fusion: FusionChoice, cache: TeacherCache) -> dict[str, Any] | None:
    """The figures of a cache's preflight that a run shows beside its own; None if there was no preflight.

    Raises:
        FormatError: the cache has something else in their place.
        CacheError: as `FusionChoice.resolve`.
    """
    figures = fusion.kept_accuracies(cache)
    try:
        return _checked_figures(figures)
    except ValueError as error:
        raise FormatError(
            "damaged record of the preflight",
            where=cache.path,
            found=error,
            next_step="build the cache again, or get it from where it came from",
        ) from error


def summary(result: RunResult) -> str:
    """The result as a short table."""
    several = isinstance(result.last, MultiLabelEvaluation)
    table = TextTable(["", "mAP", "BCE"] if several else ["", "top-1", "top-5", "NLL", "ECE"])
    for name, figure in figures_of_teachers(result.teachers).items():
        table.add_row(_ROWS.get(name, name), f"{figure:.2%}")
    _add_student(table, result, "on labels" if result.loss in LABELS_ALONE else "distilled")
    if result.labels_only is not None:
        _add_student(table, result.labels_only, "on labels alone")
    lines = [table.text()]
    if (gain := result.gain_over_labels) is not None:
        unit = HEADLINES["map" if several else "top1"]
        lines.append(f"distilled − on labels alone: {100 * gain:+.2f} points of {unit}, last epoch, one seed")
    return "\n".join([*lines, "", *map(printable, _notes(result))])


def _add_student(table: TextTable, result: RunResult, training: str) -> None:
    best = f"best epoch ({result.best_epoch + 1})" if result.best_epoch is not None else ""
    rows = [(f"{result.student} {training}", result.last), (f"  its {best}", result.best), ("  its EMA", result.ema)]
    for split, figures in result.more_tests.items():
        named = (("last", figures.last), ("best", figures.best), ("EMA", figures.ema))
        rows += [(fitted(f"  its {which} on {split}"), evaluation) for which, evaluation in named]
    for label, evaluation in rows:
        if evaluation is not None:
            table.add_row(label, *_cells(evaluation))


def _cells(evaluation: Figures) -> tuple[str, ...]:
    if isinstance(evaluation, MultiLabelEvaluation):
        return f"{evaluation.map:.2%}", nats(evaluation.bce)
    top5 = "–" if evaluation.top5 is None else f"{evaluation.top5:.2%}"
    return f"{evaluation.top1:.2%}", top5, nats(evaluation.nll), f"{evaluation.ece:.4f}"


def fitted(label: str, width: int = 44) -> str:
    """A label of at most this width; of a long one, such as a path, the end is shown."""
    return label if len(label) <= width else f"{label[:10]}…{label[len(label) - width + 11 :]}"


def _notes(result: RunResult) -> list[str]:
    notes = []
    if result.last is not None:
        notes.append(f"Students: {result.last.n:,} images of the {result.test_split} split, seed {result.seed}.")
    else:
        notes.append("Nothing was evaluated: there is no test split.")
    notes += [f"Note: {note}." for note in result.notes]
    if (seen := result.test_preprocessing) is not None and seen.size is not None:
        height, width = seen.size
        resized = "centre crop" if seen.crop < 1.0 else "resized"
        notes.append(f"Tested at {height} × {width} pixels ({resized}, {seen.crop:.1%} of the shorter side).")
    if precision := sorted(result.average_precision.items(), key=lambda item: item[1]):
        shown = [f"{name} {value:.2%}" for name, value in (precision if len(precision) <= 6 else precision[:3])]
        which = "" if len(precision) <= 6 else f" of {len(precision)} classes, the lowest"
        notes.append(f"Average precision{which}: {', '.join(shown)}.")
    if (teachers := result.teachers) and "n" in teachers:
        split = f"the {teachers['split']} split" if "split" in teachers else "a labelled sample"
        who = " and ".join(", ".join(figures_of_teachers(result.teachers)).rsplit(", ", 1))
        notes.append(
            f"{who[:1].upper()}{who[1:]}: {teachers['n']:,} clean images of {split}, when the cache was built."
        )
    notes.append(
        f"{result.parameters:,} parameters, {counted(result.epochs, 'epoch')} of {result.train_samples:,} images, "
        f"{duration(result.train_s)} of training on {result.environment.get('device', '?')}."
    )
    notes += [f"Note: {note}." for note in result.data_notes]
    notes.append(f"Everything is in {result.folder}; open {result.folder / REPORT} in a browser.")
    return notes
