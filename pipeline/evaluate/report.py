"""Options of an evaluation, its results, and the files that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from cache_tools.config import Frozen
from cache_tools.files import SafeFolder
from cache_tools.format.recipe import Precision
from pipeline.evaluate.agreement import Agreement, LabelAgreement
from train.evaluate.confusion import ClassFigures, Confusion
from train.evaluate.metrics import Evaluation
from train.evaluate.multilabel import Figures, LabelFigures
from train.evaluate.robustness import RobustnessSummary
from train.runs.folder import EVALUATION_FILES

REPORT, CONFUSION, CONFUSION_PICTURE, ROBUSTNESS, ROBUSTNESS_PICTURE = EVALUATION_FILES


class EvaluateOptions(Frozen):
    """Options of an evaluation.

    Attributes:
        checkpoint: `last`, `best` or `ema`, the one to report in detail; None for the given file, or `last`.
        split: replaces the run's test split.
        robustness: evaluate on corrupted copies, which are generated once and kept.
        robustness_samples: the largest number of test images to corrupt.
        corruptions: a folder in the layout of CIFAR-10-C, used instead of generated copies.
        baseline: the run that mCE is relative to; None for the run's own twin on labels alone.
        shifted: a folder of other images of the same classes.
        teachers: compare with the cache's teachers.
        precision: of the student's forward passes.
        workers: processes that generate corrupted copies.
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


class CheckpointFigures(Frozen):
    """One set of weights of a run on the test split; `epoch` counts from 1."""

    checkpoint: str
    epoch: int
    evaluation: Figures


class RobustnessReport(Frozen):
    """Robustness on `samples` corrupted images from `source`; `baseline` is the run that mCE is relative to."""

    source: str
    samples: int
    baseline: Path | None
    summary: RobustnessSummary


class EvaluationReport(Frozen):
    """The content of `evaluation.json`. All but `figures`, `baseline_figures` and `more_splits` is about `checkpoint`.

    `more_splits` has the figures of every checkpoint on further test splits; everything else is about `split`.
    Where images may have any number of labels, `labels` takes the place of `classes` and `confused`, which are empty.
    `notes` are what a reader of the figures should know, such as classes without test images.
    """

    run: Path
    folder: Path
    name: str
    student: str
    loss: str
    seed: int
    recipe_digest: str
    dataset: str
    split: str
    checkpoint: str
    figures: tuple[CheckpointFigures, ...]
    baseline_figures: CheckpointFigures | None = None
    more_splits: dict[str, tuple[CheckpointFigures, ...]] = Field(default_factory=dict)
    classes: tuple[ClassFigures, ...]
    confused: tuple[Confusion, ...]
    labels: tuple[LabelFigures, ...] = ()
    robustness: RobustnessReport | None = None
    shifted: Evaluation | None = None
    shifted_folder: Path | None = None
    teachers: tuple[Agreement, ...] | tuple[LabelAgreement, ...] | None = None
    notes: tuple[str, ...] = ()
    precision: Precision
    device: str
    command: str

    @property
    def chosen(self) -> CheckpointFigures:
        """The figures of `checkpoint`."""
        return next(row for row in self.figures if row.checkpoint == self.checkpoint)

    def save(self, files: Mapping[str, bytes], folder: SafeFolder) -> None:
        """Write the report and its files into `folder`, each atomically, the report last.

        Files that only an earlier evaluation wrote are removed: the folder is about one evaluation.
        """
        folder.remove(REPORT)
        folder.remove_partials()  # of killed evaluations
        for name in (CONFUSION, CONFUSION_PICTURE, ROBUSTNESS, ROBUSTNESS_PICTURE):
            if name in files:
                folder.put_durably(name, files[name])
            else:
                folder.remove(name)
        folder.put_durably(REPORT, self.model_dump_json(indent=2).encode())
