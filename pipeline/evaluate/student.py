"""One checkpoint of a run: its logits on the test split and its robustness to corruptions."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from cache_tools.console import Progress
from cache_tools.format.recipe import Precision, Preprocessing
from cache_tools.images.image_set import ImageSet
from pipeline.evaluate.report import ROBUSTNESS, ROBUSTNESS_PICTURE, CheckpointFigures, RobustnessReport
from train.checkpoints import load_student
from train.evaluate.corruptions import CORRUPTIONS, SEVERITIES, Corrupted
from train.evaluate.metrics import evaluate_logits, predict
from train.evaluate.multilabel import Figures, multilabel_figures
from train.evaluate.robustness import RobustnessSummary, robustness, summarise
from train.recipe.loss import LABELS_ALONE
from train.runs.stored import StoredRun, data_name


@dataclass(frozen=True, kw_only=True)
class EvaluatedStudent:
    """A network in eval mode, its preprocessing, and its logits float32 [N, C] on the clean test split."""

    run: StoredRun
    model: nn.Module
    preprocessing: Preprocessing
    logits: Tensor
    figures: CheckpointFigures

    @property
    def title(self) -> str:
        """Its name in tables and figures."""
        loss = self.run.recipe.loss_name
        return f"{self.run.recipe.student} ({'on labels' if loss in LABELS_ALONE else loss})"

    def predict(
        self, images: ImageSet, device: torch.device, batch_size: int, precision: Precision, title: str
    ) -> Tensor:
        """Logits on other images."""
        return _predict(self.model, self.preprocessing, images, device, batch_size, precision, title)


def evaluate_checkpoint(
    run: StoredRun,
    which: str,
    images: ImageSet,
    device: torch.device,
    batch_size: int = 512,
    precision: Precision = "float32",
    title: str = "evaluate",
) -> EvaluatedStudent:
    """Load a checkpoint (`last`, `best`, `ema`) of a run and evaluate it on clean images."""
    model, card = load_student(run.checkpoint(which), device)
    preprocessing = card.preprocessing(images.image_size)
    logits = _predict(model, preprocessing, images, device, batch_size, precision, title)
    evaluation: Figures
    if images.multi_label:
        evaluation, _ = multilabel_figures(logits, images.labels, images.class_names)
    else:
        evaluation = evaluate_logits(logits, torch.from_numpy(np.ascontiguousarray(images.labels, np.int64)).to(device))
    figures = CheckpointFigures(checkpoint=which, epoch=card.epoch, evaluation=evaluation)
    return EvaluatedStudent(run=run, model=model, preprocessing=preprocessing, logits=logits, figures=figures)


def measure_robustness(
    student: EvaluatedStudent,
    baseline: EvaluatedStudent | None,
    corrupted: Corrupted,
    images: ImageSet,
    device: torch.device,
    batch_size: int = 512,
    precision: Precision = "float32",
) -> tuple[RobustnessReport, dict[str, bytes]]:
    """Evaluate the student and its baseline on corrupted copies of `images`. Returns the report and its files."""
    students = {"student": student} if baseline is None else {"student": student, "baseline": baseline}
    total = len(students) * len(corrupted) * len(CORRUPTIONS) * len(SEVERITIES)
    with Progress("robustness", total, "images") as progress:
        frames = {
            name: robustness(
                entry.model,
                corrupted,
                entry.preprocessing,
                device,
                precision,
                batch_size=batch_size,
                advance=progress.advance,
            )
            for name, entry in students.items()
        }
    clean = {name: _clean_error(entry.logits, corrupted) for name, entry in students.items()}
    summary = summarise(frames["student"], clean["student"], frames.get("baseline"), clean.get("baseline"))
    table = pl.concat([frame.select(pl.lit(name).alias("student"), pl.all()) for name, frame in frames.items()])
    files = {ROBUSTNESS: parquet(table), ROBUSTNESS_PICTURE: _picture(student, baseline, frames, summary, images)}
    report = RobustnessReport(
        source=corrupted.source,
        samples=len(corrupted),
        baseline=None if baseline is None else baseline.run.folder,
        summary=summary,
    )
    return report, files


def parquet(frame: pl.DataFrame) -> bytes:
    """A table as a parquet file."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def _predict(
    model: nn.Module,
    preprocessing: Preprocessing,
    images: ImageSet,
    device: torch.device,
    batch_size: int,
    precision: Precision,
    title: str,
) -> Tensor:
    with Progress(title, len(images), "images") as progress:
        return predict(model, images, preprocessing, device, batch_size, precision, progress.advance)


def _clean_error(logits: Tensor, corrupted: Corrupted) -> float:
    """The error on the uncorrupted originals of the same images."""
    index, labels = (torch.from_numpy(array).to(logits.device) for array in (corrupted.index, corrupted.labels))
    return int((logits[index].argmax(1) != labels).sum()) / len(index)


def _picture(
    student: EvaluatedStudent,
    baseline: EvaluatedStudent | None,
    frames: dict[str, pl.DataFrame],
    summary: RobustnessSummary,
    images: ImageSet,
) -> bytes:
    from train.evaluate.robustness_plot import plot_robustness

    figure = f"mean error {summary.mean_error:.1%}" if summary.mce is None else f"mCE {summary.mce:.3f}"
    count, named = int(frames["student"]["n"][0]), data_name(student.run.folder, images.name)
    return plot_robustness(
        frames["student"],
        summary,
        f"{student.title} under corruptions, {count:,} images of {named}: {figure}",
        num_classes=len(images.class_names),
        baseline=frames.get("baseline"),
        student_name=student.title,
        baseline_name="baseline" if baseline is None else baseline.title,
    )
