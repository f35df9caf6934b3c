"""`evaluate-student`: evaluate a trained student on test images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cache_tools.console import command, printable_json, run_app
from cache_tools.system.memory import keep_freed_memory
from train.options import DataDir, Device, Download, ForwardBatchSize, ReportAsJson, RunArgument

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
@command
def evaluate_student(
    run: RunArgument,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            help="last, best or ema: the checkpoint to report in detail. Default: the given file, or last.",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Evaluate on this split instead of the run's test split.")
    ] = None,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="Measure the error under the 15 corruptions of ImageNet-C.")
    ] = False,
    robustness_samples: Annotated[
        int | None,
        typer.Option("--robustness-samples", help="Corrupt only this many evenly spaced test images."),
    ] = None,
    corruptions: Annotated[
        Path | None,
        typer.Option(
            "--corruptions",
            help="A folder of corrupted test images in the layout of CIFAR-10-C, instead of generated ones.",
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline", help="The run that mCE is relative to. Default: this run's twin trained on labels alone."
        ),
    ] = None,
    shifted: Annotated[
        Path | None,
        typer.Option("--shifted", help="A folder of other images of the same classes, one folder per class."),
    ] = None,
    teachers: Annotated[
        bool,
        typer.Option(
            "--teachers", help="Compare with the teacher, CLIP and fusion of the cache (needs their weights)."
        ),
    ] = False,
    data_dir: DataDir = None,
    download: Download = False,
    device: Device = "auto",
    precision: Annotated[
        str,
        typer.Option("--precision", help="Precision of the student's forward passes: float32, bfloat16 or float16."),
    ] = "float32",
    batch_size: ForwardBatchSize = 512,
    workers: Annotated[
        int | None,
        typer.Option("--workers", help="Processes that generate corrupted images. Default: one per core."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the report. Default: RUN/evaluation.")] = None,
    as_json: ReportAsJson = False,
) -> None:
    """Evaluate a student on test images: accuracy, likelihood, calibration, confusions, robustness, agreement.

    Tables and figures go to RUN/evaluation. Corrupted images are generated once and kept in $TEACHER_CACHE_HOME.
    """
    # Imported here because torch takes seconds to import, and --help does not need it.
    import os

    from cache_tools.config import typed_settings, validate
    from pipeline.evaluate.evaluator import evaluate_student as evaluate
    from pipeline.evaluate.report import EvaluateOptions

    keep_freed_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = {
        "checkpoint": checkpoint,
        "split": split,
        "robustness": robustness,
        "robustness_samples": robustness_samples,
        "corruptions": corruptions,
        "baseline": baseline,
        "shifted": shifted,
        "teachers": teachers,
        "data_dir": data_dir,
        "download": download,
        "device": device,
        "precision": precision,
        "batch_size": batch_size,
        "workers": cores if workers is None else workers,
        "out": out,
    }
    options = validate(EvaluateOptions, given, where="options", typed=typed_settings((), given))
    report = evaluate(run, options)
    if as_json:
        print(printable_json(report.model_dump_json(indent=2)))
        return
    from pipeline.evaluate.text import print_report

    print_report(report)


def main() -> None:
    """Entry point of `evaluate-student`."""
    run_app(app)


if __name__ == "__main__":
    main()
