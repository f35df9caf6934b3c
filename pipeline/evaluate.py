"""Everything there is to say about a trained student on test images, in one report beside the run.

Each part is a library function of its own (`train.evaluate`, `train.confusion`, `train.robustness`,
`train.shifted`, `pipeline.agreement`); this puts them together for one run.
"""

from __future__ import annotations

import io
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from cache_tools.config import Frozen
from cache_tools.console import Progress, resolve_device
from cache_tools.errors import DataError, StorageError
from cache_tools.format import Precision, Preprocessing
from cache_tools.images import ImageSet
from pipeline.agreement import Agreement, agreement, load_teachers
from pipeline.evaluation_report import (
    CONFUSION,
    CONFUSION_PICTURE,
    ROBUSTNESS,
    ROBUSTNESS_PICTURE,
    CheckpointFigures,
    EvaluationReport,
    RobustnessReport,
)
from train.checkpoints import StudentCard, load_student, read_card
from train.confusion import class_figures, confused_pairs, confusion_frame, confusion_matrix
from train.corruptions import CORRUPTIONS, SEVERITIES, Corrupted, open_corrupted
from train.evaluate import Evaluation, evaluate_logits, predict
from train.robustness import robustness, summarise
from train.shifted import open_shifted
from train.stored_run import StoredRun, open_run

FOLDER = "evaluation"


class EvaluateOptions(Frozen):
    """What to evaluate of a run, and how.

    Attributes:
        checkpoint: `last`, `best` or `ema`: whose details are reported. None for `last`, or the file that was given.
        split: instead of the run's test split.
        robustness: on corrupted copies, made and kept if there are none; `corruptions` is a folder in the layout of
            CIFAR-10-C instead, `robustness_samples` a limit on test images.
        baseline: the run that mCE is relative to; None for the run's own twin on labels alone.
        shifted: a folder of other pictures of the same classes.
        teachers: compare with the cache's teachers.
        precision: of the student's forward passes.
        workers: processes that make corrupted copies.
    """

    checkpoint: Literal["last", "best", "ema"] | None = None
    split: str | None = None
    robustness: bool = False
    robustness_samples: PositiveInt | None = None
    corruptions: Path | None = None
    baseline: Path | None = None
    shifted: Path | None = None
    teachers: bool = False
    data_dir: Path | None = None
    download: bool = False
    device: str = "auto"
    precision: Precision = "float32"
    batch_size: PositiveInt = 512
    workers: PositiveInt = 1
    out: Path | None = None


def evaluate_student(path: Path | str, options: EvaluateOptions | None = None) -> EvaluationReport:
    """Evaluate a run of train-student, and write the report, tables and pictures into its folder `evaluation`.

    Args:
        path: a run folder, or a checkpoint file in one.

    Raises:
        CacheError: the subclass says what is wrong: run, checkpoint, images, corruptions, teachers, device or options.
    """
    options = options or EvaluateOptions()
    return _Evaluator(path, options).report()


@dataclass(frozen=True, kw_only=True)
class _Student:
    """A network in eval mode, what it reads, and what it says about the test split."""

    title: str
    model: nn.Module
    preprocessing: Preprocessing
    logits: Tensor
    figures: CheckpointFigures


class _Evaluator:
    """One evaluation: what is needed is opened and checked before anything long begins."""

    def __init__(self, path: Path | str, options: EvaluateOptions) -> None:
        self.options = options
        self.device = resolve_device(options.device)
        self.run, given = open_run(path)
        self.checkpoint = options.checkpoint or given or "last"
        card = read_card(self.run.checkpoint(self.checkpoint))
        self.folder = _writable(options.out or self.run.folder / FOLDER)
        self.images = self.run.open_test(card, options.split, options.data_dir, options.download)
        self.labels = torch.from_numpy(np.ascontiguousarray(self.images.labels, np.int64)).to(self.device)
        self.baseline = self._open_baseline(card)
        self.shifted = (
            open_shifted(options.shifted, card.class_names, self.images.image_size) if options.shifted else None
        )
        self.teachers = load_teachers(self.run, self.images, self.device) if options.teachers else None
        self.corrupted = self._open_corrupted()

    def report(self) -> EvaluationReport:
        """Run everything that was asked for, then write."""
        students = {which: self._student(self.run, which) for which in self.run.checkpoints()}
        student = students[self.checkpoint]
        baseline = None if self.baseline is None else self._student(*self.baseline, title="baseline")
        matrix = confusion_matrix(student.logits, self.labels)
        names = self.images.class_names
        files: dict[str, bytes] = {
            CONFUSION: _parquet(confusion_frame(matrix, names)),
            CONFUSION_PICTURE: self._confusion_picture(matrix, student),
        }
        robust = self._robustness(student, baseline, files) if self.corrupted is not None else None
        shifted = self._shifted(student)
        recipe = self.run.recipe
        report = EvaluationReport(
            run=self.run.folder,
            folder=self.folder,
            name=recipe.name,
            student=recipe.student,
            loss=recipe.loss_name,
            seed=recipe.seed,
            recipe_digest=read_card(self.run.checkpoint(self.checkpoint)).recipe_digest,
            dataset=self.images.name,
            split=self.images.split,
            checkpoint=self.checkpoint,
            figures=tuple(entry.figures for entry in students.values()),
            baseline_figures=None if baseline is None else baseline.figures,
            classes=class_figures(matrix, names),
            confused=confused_pairs(matrix, names),
            robustness=robust,
            shifted=shifted,
            shifted_folder=self.options.shifted,
            teachers=self._agreement(student),
            precision=self.options.precision,
            device=_device_name(self.device),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        )
        report.save(files)
        return report

    def _open_baseline(self, card: StudentCard) -> tuple[StoredRun, str] | None:
        """The run that mCE is relative to, and its checkpoint of the same kind."""
        twin = self.run.labels_only()
        path = self.options.baseline or twin
        if path is None:
            return None
        run, given = open_run(path)
        which = given or self.checkpoint
        theirs = read_card(run.checkpoint(which)).class_names
        if theirs != card.class_names:
            raise DataError(
                "the baseline was trained on other classes",
                where=path,
                expected=", ".join(card.class_names[:8]),
                found=", ".join(theirs[:8]),
            )
        return run, which

    def _open_corrupted(self) -> Corrupted | None:
        options, samples = self.options, self.options.robustness_samples
        if options.corruptions is not None:
            corrupted = open_corrupted(options.corruptions, self.images.labels, samples)
            if corrupted.image_size != tuple(self.images.image_size):
                raise DataError(
                    "the corrupted images have another size than the test images",
                    where=options.corruptions,
                    expected=f"{self.images.image_size}",
                    found=f"{corrupted.image_size}",
                )
            return corrupted
        if options.robustness or samples is not None:
            from train.corrupt import corrupted_copies

            return corrupted_copies(self.images, samples, workers=options.workers)
        return None

    def _student(self, run: StoredRun, which: str, title: str | None = None) -> _Student:
        file = run.checkpoint(which)
        model, card = load_student(file, self.device)
        preprocessing = Preprocessing(mean=card.mean, std=card.std)
        logits = self._predict(model, self.images, preprocessing, title or which)
        figures = CheckpointFigures(checkpoint=which, epoch=card.epoch, evaluation=evaluate_logits(logits, self.labels))
        how = "on labels" if run.recipe.loss_name == "ce" else run.recipe.loss_name
        return _Student(
            title=f"{run.recipe.student} ({how})",
            model=model,
            preprocessing=preprocessing,
            logits=logits,
            figures=figures,
        )

    def _robustness(self, student: _Student, baseline: _Student | None, files: dict[str, bytes]) -> RobustnessReport:
        from train.robustness_plot import plot_robustness

        corrupted, options = self.corrupted, self.options
        assert corrupted is not None
        both = [student] if baseline is None else [student, baseline]
        total = len(both) * len(corrupted) * len(CORRUPTIONS) * len(SEVERITIES)
        with Progress("robustness", total, "images") as progress:
            frames = [
                robustness(
                    entry.model,
                    corrupted,
                    entry.preprocessing,
                    self.device,
                    options.precision,
                    batch_size=options.batch_size,
                    advance=progress.advance,
                )
                for entry in both
            ]
        errors, other = frames[0], frames[1] if baseline is not None else None
        clean = [self._clean_error(entry.logits, corrupted) for entry in both]
        summary = summarise(errors, clean[0], other, clean[1] if baseline is not None else None)
        stored = [frame.insert_column(0, pl.Series("student", [who] * len(frame))) for who, frame in
                  zip(("student", "baseline"), frames, strict=False)]  # fmt: skip
        files[ROBUSTNESS] = _parquet(pl.concat(stored))
        against = f"mCE {summary.mce:.3f}" if summary.mce is not None else f"mean error {summary.mean_error:.1%}"
        files[ROBUSTNESS_PICTURE] = plot_robustness(
            errors,
            summary,
            f"{student.title} under corruptions, {len(corrupted):,} {self.images.name} images: {against}",
            num_classes=len(self.images.class_names),
            baseline=other,
            student_name=student.title,
            baseline_name="baseline" if baseline is None else baseline.title,
        )
        base = self.baseline[0].folder if self.baseline is not None else None
        return RobustnessReport(source=corrupted.source, samples=len(corrupted), baseline=base, summary=summary)

    def _clean_error(self, logits: Tensor, corrupted: Corrupted) -> float:
        """On the same images as they are without corruption."""
        index = torch.from_numpy(corrupted.index).to(self.device)
        return 1.0 - float((logits[index].argmax(1) == self.labels[index]).double().mean())

    def _shifted(self, student: _Student) -> Evaluation | None:
        if self.shifted is None:
            return None
        logits = self._predict(student.model, self.shifted, student.preprocessing, "shifted images")
        return evaluate_logits(logits, torch.from_numpy(self.shifted.labels).to(self.device))

    def _predict(self, model: nn.Module, images: ImageSet, preprocessing: Preprocessing, title: str) -> Tensor:
        size, precision = self.options.batch_size, self.options.precision
        with Progress(f"evaluate {title}", len(images), "images") as progress:
            return predict(model, images, preprocessing, self.device, size, precision, progress.advance)

    def _agreement(self, student: _Student) -> tuple[Agreement, ...] | None:
        if self.teachers is None:
            return None
        with Progress("teachers", len(self.images), "images") as progress:
            return agreement(student.logits, self.teachers, self.images, advance=progress.advance)

    def _confusion_picture(self, matrix: Any, student: _Student) -> bytes:
        from train.confusion_plot import plot_confusion

        figures = student.figures
        title = f"{student.title}, {figures.checkpoint} epoch: {figures.evaluation.top1:.2%} of "
        title += f"{figures.evaluation.n:,} images right, {self.images.name} {self.images.split}"
        return plot_confusion(matrix, self.images.class_names, title)


def _writable(folder: Path) -> Path:
    """The folder of the report, made now: a place that cannot be written is better known before the work."""
    if folder.exists() and not folder.is_dir():
        raise StorageError("a file is where the evaluation should be", where=folder, next_step="choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
