"""`export-student`: write a trained student as safetensors, TorchScript, torch.export or ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache_tools.console import command, print_next, printable_json, run_app
from cache_tools.errors import RecipeError, printable
from train.options import DataDir, ReportAsJson, RunArgument

if TYPE_CHECKING:
    from train.export.config import ExportReport

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
@command
def export_student(
    run: RunArgument,
    weights: Annotated[
        str | None, typer.Option("--weights", help="last, best or ema. Default: last, or the given file.")
    ] = None,
    formats: Annotated[
        str, typer.Option("--format", help="safetensors, torchscript, torch-export, onnx; separated by commas.")
    ] = "safetensors,torchscript,torch-export",
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the files. Default: RUN/export.")] = None,
    batch_size: Annotated[
        str, typer.Option("--batch-size", help="Batch size of the graphs: dynamic (any number of images), or a number.")
    ] = "dynamic",
    reads: Annotated[
        str,
        typer.Option("--input", help="pixels (uint8, normalised inside) or normalised (float32, by the caller)."),
    ] = "pixels",
    samples: Annotated[int, typer.Option("--samples", help="Number of test images to compare every file on.")] = 1000,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Largest difference of a logit, relative to the largest logit.")
    ] = 1e-4,
    split: Annotated[
        str | None, typer.Option("--split", help="Split to compare on. Default: the run's test split.")
    ] = None,
    data_dir: DataDir = None,
    as_json: ReportAsJson = False,
) -> None:
    """Write a trained student in formats that need no teacher-cache, with a config.json.

    Every file is loaded again and compared with the student on test images. If one file differs, none is kept.
    """
    values = {
        "weights": weights,
        "formats": tuple(name.strip() for name in formats.split(",")),
        "out": out,
        "batch_size": _batch_size(batch_size),
        "input": reads,
        "samples": samples,
        "tolerance": tolerance,
        "split": split,
        "data_dir": data_dir,
    }
    # torch takes seconds to import: --help does not wait for it.
    from cache_tools.config import typed_settings, validate
    from train.export.student import ExportOptions
    from train.export.student import export_student as export

    typed = typed_settings((), values, {"formats": "--format"})
    report = export(run, validate(ExportOptions, values, where="options", typed=typed))
    if as_json:
        print(printable_json(report.model_dump_json(indent=2)))
    else:
        from train.runs.stored import data_name

        folder = run if run.is_dir() else run.parent
        print(_table(report, data_name(folder, report.dataset)))
        print_next("report-students", folder)


def _batch_size(text: str) -> int | None:
    if text == "dynamic":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise RecipeError(
            "no such batch size", where=f"--batch-size {text}", expected="dynamic, or a number of images"
        ) from error


def _table(report: ExportReport, images: str) -> str:
    lines = [f"{'file':<24}{'size':>12}{'largest difference':>22}{'same top-1':>14}"]
    lines += [
        f"{entry.file:<24}{entry.file_bytes / 1e6:>9.2f} MB{entry.max_difference:>22.2g}{entry.top1_agreement:>14.2%}"
        for entry in report.files
    ]
    height, width = report.image_size
    kind = "uint8 pixels" if report.input == "pixels" else "normalised float32"
    lines += [
        "",
        f"{report.student}, {report.checkpoint} weights of epoch {report.epoch}, "
        f"compared on {report.samples:,} images of {images} {report.split}.",
        f"Graphs read {kind} [{report.batch_size or 'N'}, 3, {height}, {width}]; see config.json.",
        f"Everything is in {report.folder}",
    ]
    return "\n".join(map(printable, lines))


def main() -> None:
    """Entry point of `export-student`."""
    run_app(app)


if __name__ == "__main__":
    main()
