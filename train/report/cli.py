"""`report-students`: write the page of runs and sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cache_tools.console import command, print_line, run_app
from cache_tools.errors import RecipeError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
@command
def report_students(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders of train-student, or folders of sweeps.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The HTML file. Default: report.html, in the folder if there is only one."),
    ] = None,
    title: Annotated[
        str, typer.Option("--title", help="Title of the page. Default: what the runs have in common.")
    ] = "",
    pictures: Annotated[
        str | None,
        typer.Option(
            "--pictures",
            metavar="CACHE",
            help="Also show samples of this cache, with what teacher, CLIP, fusion and the best student say.",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", help="Where the images of that cache are, if they were moved since the build."),
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write one HTML page that compares runs: figures, accuracy against cost, curves, calibration, classes, commands.

    The page is a single file that loads nothing else. Runs that differ only in their seed are one row.
    --pictures copies a few images into the page, so think before you send it.
    """
    if data_dir is not None and pictures is None:
        raise RecipeError("--data-dir is where the images of --pictures are", next_step="add --pictures CACHE")

    from cache_tools.units import human_bytes
    from train.report.html import write_report
    from train.report.pictures import PictureSource
    from train.report.trials import read_tables
    from train.runs.folder import REPORT

    folders, table = read_tables(runs)
    path = write_report(
        folders,
        out or (runs[0] / REPORT if len(runs) == 1 else Path(REPORT)),
        trials=table,
        title=title,
        pictures=None if pictures is None else PictureSource(pictures, data_dir),
    )
    print_line(f"{path}: {human_bytes(path.stat().st_size)}; open it in a browser, or add --open")
    if open_it:
        typer.launch(path.absolute().as_uri())


def main() -> None:
    """Entry point of `report-students`."""
    run_app(app)


if __name__ == "__main__":
    main()
