"""Evaluate a trained student on test images and write one report beside the run.

Each part is a library function (`train.evaluate`, `train.evaluate.confusion`, `train.evaluate.robustness`,
`train.evaluate.shifted`, `pipeline.evaluate.agreement`). This module combines them for one run.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_tools.console import Progress, describe_device, resolve_device
from cache_tools.errors import DataError
from cache_tools.files import SafeFolder, output_folder
from cache_tools.images.classes import missing_notes
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import require_one_label
from pipeline.evaluate.agreement import Agreement, LabelAgreement, agreement, label_agreement, load_teachers
from pipeline.evaluate.report import (
    CONFUSION,
    CONFUSION_PICTURE,
    CheckpointFigures,
    EvaluateOptions,
    EvaluationReport,
    RobustnessReport,
)
from pipeline.evaluate.student import EvaluatedStudent, evaluate_checkpoint, measure_robustness, parquet
from pipeline.networks.ensemble import TeacherEnsemble
from train.checkpoints import StudentCard, read_card
from train.evaluate.canvas import ImagesInTest
from train.evaluate.confusion import class_figures, confusion_frame, confusion_matrix, most_confused
from train.evaluate.corruptions import Corrupted, open_corrupted
from train.evaluate.metrics import Evaluation, evaluate_logits
from train.evaluate.multilabel import label_figures
from train.evaluate.shifted import open_shifted
from train.runs.folder import EVALUATION, EVALUATION_FILES, check_derived
from train.runs.stored import StoredRun, data_name, open_run
from train.weights.run_files import real_folder


def evaluate_student(path: Path | str, options: EvaluateOptions | None = None) -> EvaluationReport:
    """Evaluate a run of train-student and write the report, tables and figures into its folder `evaluation`.

    Args:
        path: a run folder, or a checkpoint file in one.

    Raises:
        CacheError: a problem with the run, checkpoint, images, corruptions, teachers, device or options.
    """
    options = options or EvaluateOptions()
    return _Evaluator(path, options).report()


class _Evaluator:
    """One evaluation. Everything that it needs is opened and checked before any long computation."""

    def __init__(self, path: Path | str, options: EvaluateOptions) -> None:
        self.options = options
        self.device = resolve_device(options.device)
        self.run, given = open_run(path)
        self.checkpoint = options.checkpoint or given or "last"
        card = read_card(self.run.checkpoint(self.checkpoint))
        if options.out is None:
            self.files = real_folder(self.run.folder, EVALUATION)
        else:
            self.files = SafeFolder(output_folder(options.out, "evaluation"))
        check_derived(self.files, EVALUATION_FILES)
        self.images = self.run.open_test(card, options.split, options.data_dir, options.download)
        if self.images.multi_label:
            self._refuse_parts_of_one_label()
        self.more = [
            self.run.open_test(card, split, options.data_dir, options.download)
            for split in (() if options.split else self.run.dataset.test_splits[1:])
        ]
        self.baseline = self._open_baseline(card)
        self.shifted: ImageSet | None = None
        if options.shifted:
            shifted = open_shifted(options.shifted, card.class_names, self.images.image_size)
            self.shifted = shifted.at(self.images.image_size[0], self.run.recipe.evaluation.interpolation)
        self.teachers: TeacherEnsemble | None = None
        self.tested: tuple[ImagesInTest, ImagesInTest | None] | None = None  # by the teachers, and by CLIP
        if options.teachers:
            test = self.images
            if not self.run.recipe.evaluation.is_default:
                test = self.run.open_test(card, options.split, options.data_dir, options.download, for_teachers=True)
            self.teachers = load_teachers(self.run, test, self.device)
            self.tested = self.run.tests_of_teachers(card, test)
        self.corrupted = self._open_corrupted()

    def report(self) -> EvaluationReport:
        """Compute all parts that the options ask for, then write them."""
        students = {which: self._student(self.run, which, which) for which in self.run.checkpoints()}
        student = students[self.checkpoint]
        baseline = None if self.baseline is None else self._student(*self.baseline, "baseline")
        files: dict[str, bytes] = {}
        recipe = self.run.recipe
        report = EvaluationReport(
            run=self.run.folder,
            folder=self.files.path,
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
            more_splits={images.split: self._figures_on(images) for images in self.more},
            **self._classes(student, files),
            robustness=self._robustness(student, baseline, files),
            shifted=self._shifted(student),
            shifted_folder=self.options.shifted,
            teachers=self._agreement(student),
            notes=missing_notes(self.images),
            precision=self.options.precision,
            device=describe_device(self.device),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        )
        report.save(files, self.files)
        return report

    def _classes(self, student: EvaluatedStudent, files: dict[str, bytes]) -> dict[str, Any]:
        """The parts of the report about classes: figures of each and, where an image has one, their confusions."""
        images, names = self.images, self.images.class_names
        if images.multi_label:
            return {"classes": (), "confused": (), "labels": label_figures(student.logits, images.labels, names)}
        labels = torch.from_numpy(np.ascontiguousarray(images.labels, np.int64)).to(self.device)
        matrix = confusion_matrix(student.logits, labels)
        files[CONFUSION] = parquet(confusion_frame(matrix, names))
        files[CONFUSION_PICTURE] = self._confusion_picture(matrix, student)
        return {"classes": class_figures(matrix, names), "confused": most_confused(matrix, names)}

    def _refuse_parts_of_one_label(self) -> None:
        """Raise RecipeError for options that need images with one label each."""
        options = self.options
        given = {
            "--robustness": options.robustness,
            "--robustness-samples": options.robustness_samples is not None,
            "--corruptions": options.corruptions is not None,
            "--shifted": options.shifted is not None,
        }
        for option, is_given in given.items():
            require_one_label(is_given, option, self.run.folder)

    def _open_baseline(self, card: StudentCard) -> tuple[StoredRun, str] | None:
        """The run that mCE is relative to, and the checkpoint to take from it."""
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
            from train.evaluate.corrupt import corrupted_copies

            return corrupted_copies(self.images, samples, workers=options.workers)
        return None

    def _student(self, run: StoredRun, which: str, title: str) -> EvaluatedStudent:
        options = self.options
        return evaluate_checkpoint(
            run, which, self.images, self.device, options.batch_size, options.precision, title=f"evaluate {title}"
        )

    def _figures_on(self, images: ImageSet) -> tuple[CheckpointFigures, ...]:
        """The figures of every checkpoint of the run on a further test split."""
        options = self.options
        return tuple(
            evaluate_checkpoint(
                self.run, which, images, self.device, options.batch_size, options.precision, f"evaluate {images.split}"
            ).figures
            for which in self.run.checkpoints()
        )

    def _robustness(
        self, student: EvaluatedStudent, baseline: EvaluatedStudent | None, files: dict[str, bytes]
    ) -> RobustnessReport | None:
        if self.corrupted is None:
            return None
        report, made = measure_robustness(
            student, baseline, self.corrupted, self.images, self.device, self.options.batch_size, self.options.precision
        )
        files |= made
        return report

    def _shifted(self, student: EvaluatedStudent) -> Evaluation | None:
        if self.shifted is None:
            return None
        size, precision = self.options.batch_size, self.options.precision
        logits = student.predict(self.shifted, self.device, size, precision, title="evaluate shifted images")
        return evaluate_logits(logits, torch.from_numpy(self.shifted.labels).to(self.device))

    def _agreement(self, student: EvaluatedStudent) -> tuple[Agreement, ...] | tuple[LabelAgreement, ...] | None:
        if self.teachers is None or self.tested is None:
            return None
        (images, tested), for_clip = self.tested
        with Progress("teachers", len(self.images), "images") as progress:
            compare = label_agreement if self.images.multi_label else agreement
            return compare(
                student.logits,
                self.teachers,
                images,
                advance=progress.advance,
                tested=tested,
                for_clip=for_clip,
            )

    def _confusion_picture(self, matrix: Any, student: EvaluatedStudent) -> bytes:
        from train.evaluate.confusion import plot_confusion

        figures = student.figures
        title = f"{student.title}, {figures.checkpoint} weights: {figures.evaluation.headline:.2%} of "
        images = data_name(student.run.folder, self.images.name)
        title += f"{figures.evaluation.n:,} images right, {images} {self.images.split}"
        return plot_confusion(matrix, self.images.class_names, title)
