"""What early stopping of the worse trials saves and costs: the same grid with and without `--asha`.

Every repeat trains the grid twice with its own seed, in full and by successive halving. `time` and `epochs` are
halving's shares of the full grid. `kept_best` counts the repeats in which the best trial of the full grid was trained
to the end. `behind` is the loss of test top-1, in points, from the best trial of all to the best one that was.

    python benchmarks/asha.py
    python benchmarks/asha.py --dataset fashion-mnist --cache CACHE --rounds 3
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import typer
from side_by_side import Dataset, Device, Overrides, Rounds, Threads, Views, environment, prepared_device, ratios
from students import build

from cache_tools.console import command
from train.recipe.loading import load_train_recipe
from train.sweep.recipe import SweepRecipe
from train.sweep.run import run_sweep


@command
def main(
    dataset: Dataset = "digits",
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Train from this cache instead of building one.")
    ] = None,
    student: Annotated[str, typer.Option("--student")] = "resnet8",
    rates: Annotated[str, typer.Option("--rates", help="Learning rates, separated by commas.")] = (
        "0.003,0.01,0.03,0.05,0.1,0.15,0.2,0.3,0.5"
    ),
    epochs: Annotated[int, typer.Option("--epochs", min=2)] = 9,
    keep_one_in: Annotated[int, typer.Option("--keep-one-in", min=2)] = 3,
    overrides: Overrides = None,
    views: Views = 4,
    rounds: Rounds = 3,
    device_name: Device = "auto",
    threads: Threads = None,
) -> None:
    """A grid of learning rates in full and by asynchronous successive halving."""
    device = prepared_device(device_name, threads)
    with tempfile.TemporaryDirectory() as folder:
        if cache is None:
            cache = Path(folder) / "cache"
            build(dataset, overrides, views, device, cache)
        repeats = []
        for seed in range(rounds):
            settings = {"cache": str(cache), "student": student, "epochs": epochs, "seed": seed, "device": str(device)}
            base = load_train_recipe(dataset, ("loggers=[]",), settings).model_dump(mode="json")
            sweep: dict[str, Any] = {"name": "grid", "base": base, "grid": {"lr": [float(x) for x in rates.split(",")]}}
            full = _run_sweep(sweep, Path(folder) / f"full-{seed}")
            halving = _run_sweep({**sweep, "asha": {"keep_one_in": keep_one_in}}, Path(folder) / f"asha-{seed}")
            repeats.append((full, halving))
    figures = _figures(repeats)
    settings = {"dataset": dataset, "student": student, "rates": rates, "run_epochs": epochs}
    settings |= {"keep_one_in": keep_one_in, "rounds": rounds}
    print(json.dumps({"benchmark": "asha", **figures, **settings, **environment(device)}), flush=True)


def _run_sweep(recipe: dict[str, Any], folder: Path) -> tuple[pl.DataFrame, float]:
    """The trials of a sweep and its seconds; the costs of students are measured in both sweeps."""
    start = time.perf_counter()
    trials = run_sweep(SweepRecipe.model_validate(recipe), folder).trials
    return trials, time.perf_counter() - start


def _figures(repeats: list[tuple[tuple[pl.DataFrame, float], tuple[pl.DataFrame, float]]]) -> dict[str, Any]:
    behind, ranks = [], []
    for (full, _), (halving, _) in repeats:
        order = full.sort("top1", descending=True, nulls_last=True)["trial"].to_list()
        kept = halving.filter(pl.col("status") == "finished").sort("top1", descending=True)
        behind.append(100 * (full["top1"].max() - kept["top1"][0]))  # type: ignore[operator]
        ranks.append(order.index(kept["trial"][0]) + 1)
    epochs = [[table["epochs_done"].sum() for table, _ in repeat] for repeat in repeats]
    return {
        "time": ratios([halving_s for _, (_, halving_s) in repeats], [full_s for (_, full_s), _ in repeats]),
        "epochs": ratios([halving for _, halving in epochs], [full for full, _ in epochs]),
        "kept_best": sum(rank == 1 for rank in ranks),
        "rank_of_kept": ranks,
        "behind": {
            "mean": round(float(np.mean(behind)), 3),
            "std": round(float(np.std(behind, ddof=min(1, len(behind) - 1))), 3),
        },
        "best_top1": [round(100 * full["top1"].max(), 2) for (full, _), _ in repeats],  # type: ignore[operator]
    }


if __name__ == "__main__":
    typer.run(main)
