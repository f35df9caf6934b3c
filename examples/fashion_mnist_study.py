"""The runs behind docs/results.md: distilling a small student from the fused teacher on Fashion-MNIST.

Every run is a `train-student` run of resnet8 in bfloat16. It sees 60 000 images (3 epochs of 20 000), in the study of
views 40 500 (135 epochs of 300). Each method has the best of three learning rates, chosen on 10 000 other images.

    python examples/fashion_mnist_study.py caches
    python examples/fashion_mnist_study.py train tune
    python examples/fashion_mnist_study.py train methods views clip-views scales [--shard 0/2]

`train` skips finished runs and continues interrupted ones. Shards divide the work between processes.
`fashion_mnist_report.py` makes tables and figures of the finished runs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from cache_tools.console import command, resolve_device
from cache_tools.images import open_images
from cache_tools.system.memory import keep_freed_memory
from train.data import open_data
from train.recipe import TrainRecipe
from train.recipe.loading import load_train_recipe
from train.recipe.loss import named_loss
from train.run import train_on
from train.runs.result import load_result

RUNS = Path("runs/study")
CACHE, VIEWS_CACHE = "fashion-mnist-study", "fashion-mnist-study-views"
SEEDS = range(5)
FRACTIONS = (1.0, 0.1, 0.01)
RATES = (0.06, 0.2, 0.6)
TUNING_SEED, TUNING_SPLIT = 100, "train[50000:]"
VIEWS = (1, 2, 4, 8, 16, 135)

# Loss and fusion of each method; the rest is as in the paper [w_L 3, T 3, w_F 0.8, α 0.7, CLIP's own scale].
CRD = {"feature": "crd", "feature_source": "fused", "crd_negatives": 512, "crd_dim": 64}
METHODS: dict[str, dict[str, Any]] = {
    "labels": {"loss": named_loss("ce")},
    "KD, teacher alone": {"loss": named_loss("kd"), "fusion.teacher_weight": 1.0},
    "KD, CLIP alone": {"loss": named_loss("kd"), "fusion.teacher_weight": 0.0},
    "RichKD-L": {"loss": named_loss("kd")},
    "RichKD-F": {"loss": {"kind": "ce", **CRD}},
    "RichKD-L+F": {"loss": {"kind": "kd", **CRD}},
    "DKD on fused": {"loss": named_loss("dkd")},
    "standardised KD on fused": {"loss": named_loss("standardised_kd")},
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Run(NamedTuple):
    """One run of a part of the study."""

    part: str
    variant: str
    fraction: float
    seed: int
    settings: dict[str, Any]

    @property
    def folder(self) -> Path:
        words = [self.variant, f"{self.fraction:g}", *(f"{rate:g}" for rate in [self.settings.get(_RATE)] if rate)]
        name = "-".join(words).replace(" ", "_").replace(",", "")
        return RUNS / self.part / f"{name}-{self.seed}"


_RATE = "optimiser.learning_rate"


@app.command()
@command
def caches() -> None:
    """Build the two component caches: 20 000 images in 4 views, 300 images in 135 views."""
    for name, count, views in ((CACHE, 20_000, 4), (VIEWS_CACHE, 300, 135)):
        changes = (f"name={name}", f"dataset.split=train[:{count}]", "store=components")
        options = [word for change in changes for word in ("--set", change)]
        build = [sys.executable, "-m", "pipeline.cli", "fashion-mnist", *options, "--views", str(views)]
        subprocess.run(build, check=True)


@app.command()
@command
def train(
    parts: Annotated[list[str], typer.Argument(help="tune, methods, views, clip-views, scales.")],
    shard: Annotated[str, typer.Option("--shard", help="i/n: train every n-th run, starting at the i-th.")] = "0/1",
    seeds: Annotated[int, typer.Option("--seeds", help="Train only this many of the five seeds.")] = len(SEEDS),
) -> None:
    """Train the unfinished runs of the named parts: runs with all labels first, seed by seed."""
    keep_freed_memory()
    number, count = (int(word) for word in shard.split("/"))
    runs = [run for part in parts for run in PARTS[part]() if run.seed < seeds or part == "tune"]
    for run in sorted(runs, key=lambda run: (-run.fraction, run.seed))[number::count]:
        _train(run)


def tune_runs() -> Iterator[Run]:
    """Each method at three learning rates; labels alone also at smaller fractions of the labels."""
    for variant, settings in METHODS.items():
        for fraction in FRACTIONS if variant == "labels" else (1.0,):
            for rate in RATES:
                yield Run("tune", variant, fraction, TUNING_SEED, {**settings, _RATE: rate})


def method_runs() -> Iterator[Run]:
    """Every method at every fraction of the labels."""
    for fraction in FRACTIONS:
        for variant, settings in METHODS.items():
            for seed in SEEDS:
                yield Run("methods", variant, fraction, seed, settings)


def views_runs() -> Iterator[Run]:
    """RichKD-L with the first 1, 2, 4, … views of a cache; 135 views are one per epoch, as with live teachers."""
    for views in VIEWS:
        for seed in SEEDS:
            yield Run("views", f"{views} views", 1.0, seed, {**METHODS["RichKD-L"], "num_views": views})


def clip_view_runs() -> Iterator[Run]:
    """RichKD-L with CLIP's targets of the clean image for every view, as in the official code."""
    for variant in ("RichKD-L", "KD, CLIP alone"):
        for seed in SEEDS:
            yield Run("clip-views", f"{variant}, clean CLIP", 1.0, seed, {**METHODS[variant], "fusion.clip_view": 0})


def scale_runs() -> Iterator[Run]:
    """RichKD-L with other scales of the cosines than CLIP's own."""
    for scale in ("match", 1.0):
        for seed in SEEDS:
            yield Run("scales", f"scale {scale}", 1.0, seed, {**METHODS["RichKD-L"], "fusion.clip_scale": scale})


PARTS = {
    "tune": tune_runs,
    "methods": method_runs,
    "views": views_runs,
    "clip-views": clip_view_runs,
    "scales": scale_runs,
}
"""The runs of each part, by its name."""


def _train(run: Run) -> None:
    recipe, device = recipe_of(run), resolve_device("cpu")
    if load_result(run.folder) is not None:
        return
    data = open_data(recipe, device)
    if run.part == "tune":  # tune on other images than the test images of the results
        from dataclasses import replace

        data = replace(data, test=open_images(data.dataset, TUNING_SPLIT))
    result = train_on(data, recipe, device)
    print(f"{run.folder.name}: {result.last.top1 if result.last else float('nan'):.2%}", flush=True)


def recipe_of(run: Run) -> TrainRecipe:
    """The training recipe of a run; needs finished tuning runs for its learning rate."""
    settings = dict(run.settings)
    views_study = run.part == "views"
    options = {
        "cache": VIEWS_CACHE if views_study else CACHE,
        "epochs": VIEWS[-1] if views_study else 3,
        "evaluate_every": VIEWS[-1] if views_study else 3,
        "precision": "bfloat16",
        "compare_with_labels": False,
        "device": "cpu",
        "seed": run.seed,
        "label_fraction": run.fraction,
        "out": str(run.folder),
        _RATE: settings.pop(_RATE, None) or _best_rate(run),
        "loss": settings.pop("loss"),
    }
    recipe = load_train_recipe("fashion-mnist", (), options | settings)
    if recipe.loss.needs_targets:
        return recipe
    # Labels alone: the same number of images seen, all labelled, with a new view of each in every epoch.
    dataset = recipe.dataset
    assert dataset is not None
    twin = recipe.on_labels(dataset.model_copy(update={"split": "train[:20000]"}), recipe.views, 1)
    return twin.model_copy(update={"num_views": None})


def _best_rate(run: Run) -> float:
    """The best learning rate of the method's tuning runs; only `labels` was tuned for each fraction of the labels."""
    base = next(name for name, settings in METHODS.items() if _same_method(settings, run.settings))
    fraction = run.fraction if base == "labels" else 1.0
    scores = {}
    for tuned in tune_runs():
        if tuned.variant == base and tuned.fraction == fraction and (result := load_result(tuned.folder)):
            assert result.last is not None
            scores[tuned.settings[_RATE]] = result.last.top1
    if len(scores) < len(RATES):
        raise SystemExit(f"{base}: run `train tune` first")
    return max(scores, key=lambda rate: scores[rate])


def _same_method(settings: dict[str, Any], found: dict[str, Any]) -> bool:
    names = ("loss", "fusion.teacher_weight")
    return all(settings.get(name) == found.get(name) for name in names)


if __name__ == "__main__":
    app()
