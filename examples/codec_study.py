"""The effect of codecs on a student: resnet8 on 20 000 images of Fashion-MNIST from caches of every codec, five seeds.

All caches are recoded from two float32 caches, so their targets come from the same forward passes. Every run sees
60 000 images (3 epochs) in bfloat16. The temperature is 4, where small probabilities count most. top-k is only meant
for temperature 1: it is trained there and compared with float32 at 1. `--sampled` adds `sampled` targets of 8 and 32
draws at both temperatures, and top-k of five classes at 4.

    python examples/codec_study.py caches [--sampled]
    python examples/codec_study.py train [--sampled] [--shard 0/2]
    python examples/codec_study.py table [--sampled]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from cache_tools.console import command, resolve_device
from cache_tools.home import registry
from cache_tools.home.sizes import size_and_time
from cache_tools.system.memory import keep_freed_memory
from train.data import open_data
from train.recipe.loading import load_train_recipe
from train.run import train_on
from train.runs.result import load_result

RUNS = Path("runs/codec-study")
SAMPLES, VIEWS, SEEDS = 20_000, 4, range(5)
SOURCES = {"fused": "fm-fused", "components": "fm-parts"}


class Variant(NamedTuple):
    """A cache and the temperature of its runs; `codec` is None for the source itself."""

    store: str
    codec: str | None
    temperature: float

    @property
    def cache(self) -> str:
        if self.codec is None:
            return SOURCES[self.store]
        return f"{SOURCES[self.store]}-{re.sub('[^a-z0-9]+', '-', self.codec)}"

    @property
    def name(self) -> str:
        return f"{self.store}, {self.codec or 'float32'}, T = {self.temperature:g}"


VARIANTS = (
    *(Variant("fused", codec, 4.0) for codec in (None, "float16", "row-step", "compact")),
    *(Variant("components", codec, 4.0) for codec in (None, "dense", "coarse")),
    *(Variant("fused", codec, 1.0) for codec in (None, "compact", "top-k")),
)
SAMPLED_VARIANTS = (
    *(Variant("fused", f"sampled:draws={draws},temperature={t}", float(t)) for t in (4, 1) for draws in (8, 32)),
    Variant("fused", "top-k:max_classes=5,temperature=4", 4.0),
)
WithSampled = Annotated[bool, typer.Option("--sampled", help="Also the variants of sampled targets.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
@command
def caches(sampled: WithSampled = False) -> None:
    """Build both sources and recode them."""
    for store, name in SOURCES.items():
        changes = (f"name={name}", f"dataset.split=train[:{SAMPLES}]")
        options = [word for change in changes for word in ("--set", change)]
        options += ["--store", store, "--codec", "float32", "--views", str(VIEWS)]
        subprocess.run([sys.executable, "-m", "pipeline.cli", "fashion-mnist", *options], check=True)
    for variant in _variants(sampled):
        if variant.codec is not None:
            recode = ["recode", SOURCES[variant.store], "--codec", variant.codec, "--name", variant.cache]
            subprocess.run([sys.executable, "-m", "cache_tools.cli", *recode], check=True)


@app.command()
@command
def train(
    shard: Annotated[str, typer.Option("--shard", help="i/n: train every n-th run, starting at the i-th.")] = "0/1",
    sampled: WithSampled = False,
) -> None:
    """Train all unfinished runs, seed by seed."""
    keep_freed_memory()
    number, count = (int(word) for word in shard.split("/"))
    for seed, variant in [(seed, variant) for seed in SEEDS for variant in _variants(sampled)][number::count]:
        folder, device = _folder(variant, seed), resolve_device("cpu")
        if load_result(folder) is not None:
            continue
        options: dict[str, Any] = {
            "cache": variant.cache,
            "epochs": 3,
            "evaluate_every": 3,
            "precision": "bfloat16",
            "compare_with_labels": False,
            "device": "cpu",
            "seed": seed,
            "out": str(folder),
            "loss": {"kind": "kd", "temperature": variant.temperature, "distill_weight": 1.0},
        }
        recipe = load_train_recipe("fashion-mnist", (), options)
        result = train_on(open_data(recipe, device), recipe, device)
        print(f"{folder.name}: {result.last.top1 if result.last else float('nan'):.2%}", flush=True)


@app.command()
@command
def table(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line per variant.")] = False,
    sampled: WithSampled = False,
) -> None:
    """Print top-1 of every variant, mean ± std, and its difference from float32 with the same seed and store."""
    scores = {variant: _scores(variant) for variant in _variants(sampled)}
    for variant, top1 in scores.items():
        exact = scores[Variant(variant.store, None, variant.temperature)]
        seeds = sorted(top1.keys() & exact.keys())
        differences = [top1[seed] - exact[seed] for seed in seeds]
        row = {
            "variant": variant.name,
            "bytes": round(_bytes(variant.cache), 1),
            "n": len(top1),
            "top1": _mean_std(list(top1.values())),
            "against_float32": _mean_std(differences),
        }
        if as_json:
            print(json.dumps(row))
        else:
            (mean, std), (change, spread) = row["top1"], row["against_float32"]
            figures = f"{mean:6.2f} ± {std:.2f}  {change:+.2f} ± {spread:.2f}  n {row['n']}"
            print(f"{variant.name:<32} {row['bytes']:>7} B  {figures}")


def _variants(sampled: bool) -> tuple[Variant, ...]:
    return (*VARIANTS, *SAMPLED_VARIANTS) if sampled else VARIANTS


def _folder(variant: Variant, seed: int) -> Path:
    return RUNS / f"{variant.name.replace(' ', '').replace(',', '-').replace('=', '').replace(':', '-')}-{seed}"


def _scores(variant: Variant) -> dict[int, float]:
    """Top-1 in per cent of the finished runs, by seed."""
    found = {seed: load_result(_folder(variant, seed)) for seed in SEEDS}
    return {seed: 100 * result.last.top1 for seed, result in found.items() if result is not None and result.last}


def _bytes(name: str) -> float:
    """Stored bytes of the logits and features per (image, view)."""
    path = registry.find(name).path
    folders = [folder for folder in path.iterdir() if (folder / "c.0.0.0").is_file() and folder.name != "commits"]
    targets = [folder for folder in folders if any(folder.glob("c.1.*"))]  # constants have no second view
    return sum(size_and_time(folder)[0] for folder in targets) / (SAMPLES * VIEWS)


def _mean_std(values: list[float]) -> tuple[float, float]:
    if not values:
        return float("nan"), float("nan")
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


if __name__ == "__main__":
    app()
