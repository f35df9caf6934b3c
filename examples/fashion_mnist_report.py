"""Tables and figures of the finished runs of `fashion_mnist_study.py`.

python examples/fashion_mnist_report.py robustness --samples 500      # the full-label runs, under corruptions
python examples/fashion_mnist_report.py tables --out study.jsonl --plot views.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import torch
import typer
from fashion_mnist_study import METHODS, PARTS, VIEWS, Run, method_runs, recipe_of

from cache_tools.console import Progress, command, resolve_device
from cache_tools.images import open_images
from cache_tools.images.recipe import DatasetRecipe
from train.checkpoints import load_student
from train.evaluate.corrupt import corrupted_copies
from train.evaluate.metrics import evaluate
from train.evaluate.robustness import robustness as measure
from train.evaluate.robustness import summarise
from train.runs.result import load_result

ERRORS = "corruption-errors.parquet"
FIGURES = ("top1", "nll", "ece")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
@command
def robustness(
    samples: Annotated[int, typer.Option("--samples", help="Number of evenly spaced test images.")] = 500,
    workers: Annotated[int, typer.Option("--workers", help="Processes that corrupt images.")] = 1,
) -> None:
    """Measure and store the errors of every finished full-label run under 15 corruptions × 5 severities."""
    dataset, device = DatasetRecipe(name="fashion-mnist"), resolve_device("cpu")
    copies = corrupted_copies(open_images(dataset, "test"), samples, workers=workers)
    runs = [run for run in method_runs() if run.fraction == 1.0 and load_result(run.folder)]
    with Progress("robustness", len(runs), "runs") as progress:
        for run in runs:
            if not (run.folder / ERRORS).exists():
                model, _ = load_student(run.folder, device)
                model = model.to(memory_format=torch.channels_last)
                errors = measure(model, copies, _preprocessing(dataset), device, "bfloat16", batch_size=128)
                errors.write_parquet(run.folder / ERRORS)
            progress.advance(1, run.folder.name)
    rows = [row for run in runs if (row := _robustness_row(run, samples))]
    _print(pl.DataFrame(rows).group_by("variant", maintain_order=True).agg(_means("clean error", "mean error", "mCE")))
    Path("robustness.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@app.command()
@command
def tables(
    out: Annotated[Path, typer.Option("--out", help="File with one JSON line per finished run.")] = Path("study.jsonl"),
    plot: Annotated[Path, typer.Option("--plot", help="Figure of accuracy against views.")] = Path("views.png"),
) -> None:
    """Write all finished runs as JSON lines, print means ± standard deviations over seeds, and plot the views."""
    table = pl.DataFrame([row for make in PARTS.values() for run in make() if (row := _row(run))])
    table.write_ndjson(out)
    _print(table.group_by("part", "fraction", "variant", maintain_order=True).agg(_means(*FIGURES)))
    _print(_paired(table))
    _plot_views(table.filter(pl.col("part") == "views"), plot)


def _row(run: Run) -> dict[str, Any] | None:
    result = load_result(run.folder)
    if result is None or result.last is None:
        return None
    return {
        "part": run.part,
        "variant": run.variant,
        "fraction": run.fraction,
        "seed": run.seed,
        "learning_rate": recipe_of(run).optimiser.learning_rate,
        "epochs": result.epochs,
        "device": result.environment["device"],
        "torch": result.environment["torch"],
        **{name: getattr(result.last, name) for name in ("n", *FIGURES)},
    }


def _paired(table: pl.DataFrame) -> pl.DataFrame:
    """Means and standard deviations, in points, of the top-1 differences from two references with the same seed."""
    methods = table.filter(pl.col("part") == "methods")
    rows, keys = methods.select("fraction", "variant", "seed", pl.col("top1") * 100), ["fraction", "seed"]
    for reference in ("labels", "KD, teacher alone"):
        other = rows.filter(pl.col("variant") == reference).select(*keys, pl.col("top1").alias("reference"))
        rows = rows.join(other, on=keys, how="left").with_columns(
            (pl.col("top1") - pl.col("reference")).alias(f"over {reference}")
        )
        rows = rows.drop("reference")
    return rows.group_by("fraction", "variant", maintain_order=True).agg(
        _means("over labels", "over KD, teacher alone")
    )


def _robustness_row(run: Run, samples: int) -> dict[str, Any] | None:
    """Compare a run with the run on labels of the same seed, on the same images."""
    baseline = Run(run.part, "labels", run.fraction, run.seed, METHODS["labels"])
    if not (baseline.folder / ERRORS).exists():
        return None
    clean = [_clean_error(each, samples) for each in (run, baseline)]
    frames = [pl.read_parquet(each.folder / ERRORS) for each in (run, baseline)]
    found = summarise(frames[0], clean[0], frames[1], clean[1])
    return {
        "variant": run.variant,
        "seed": run.seed,
        "clean error": found.clean_error,
        "mean error": found.mean_error,
        "mCE": found.mce,
        "relative mCE": found.relative_mce,
    }


def _clean_error(run: Run, samples: int) -> float:
    from train.evaluate.corruptions import evenly_spaced

    dataset = DatasetRecipe(name="fashion-mnist")
    images = open_images(dataset, "test")
    model, _ = load_student(run.folder)
    part = images.subset(evenly_spaced(len(images), samples))
    return 1.0 - evaluate(model, part, _preprocessing(dataset), resolve_device("cpu")).top1


def _preprocessing(dataset: DatasetRecipe) -> Any:
    from cache_tools.format.recipe import Preprocessing

    mean, std = dataset.normalisation
    return Preprocessing(mean=mean, std=std)


def _means(*names: str) -> list[pl.Expr]:
    figures = [(pl.col(name).mean().alias(name), pl.col(name).std().alias(f"± {name}")) for name in names]
    return [pl.len().alias("n"), *(expression for mean_and_std in figures for expression in mean_and_std)]


def _print(table: pl.DataFrame) -> None:
    with pl.Config(tbl_rows=-1, tbl_cols=-1, fmt_str_lengths=40, float_precision=4, tbl_width_chars=160):
        print(table)


def _plot_views(table: pl.DataFrame, path: Path) -> None:
    """Plot top-1 against the number of cached views: a dot per seed, mean and standard deviation over seeds."""
    from matplotlib.figure import Figure

    if table.is_empty():
        return
    figure = Figure(figsize=(6.4, 3.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    views = pl.col("variant").str.extract(r"(\d+)").cast(pl.Int64)
    points = table.with_columns(views.alias("views"), pl.col("top1") * 100)
    axes.plot(points["views"], points["top1"], "o", color="0.6", markersize=4, label="one seed")
    means = points.group_by("views").agg(pl.mean("top1"), pl.std("top1").alias("std")).sort("views")
    axes.errorbar(means["views"], means["top1"], means["std"], color="C0", marker="s", capsize=4, label="mean ± std")
    axes.set_xscale("log", base=2)
    last = VIEWS[-1]
    axes.set_xticks(VIEWS, [str(count) if count < last else f"{last}\n(one per epoch)" for count in VIEWS])
    axes.minorticks_off()
    axes.set_xlabel("cached views")
    axes.set_ylabel("test top-1, %")
    axes.set_title("Fashion-MNIST, 300 images, RichKD-L, resnet8, 135 epochs")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    app()
