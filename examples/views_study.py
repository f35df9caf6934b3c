"""How many cached views equal a fresh view in every epoch? The runs behind the section of docs/results.md.

Photos are crops of 14 photographs of scikit-image and scikit-learn at 20 pixels, a class for each photograph: training
from their left half, test from their right one. The other images are Fashion-MNIST. Weak views are shifts and flips;
strong ones are random resized crops, RandAugment and CutMix. The teachers are resnet20s that were trained on labels:
on 2800 photos, of which students see 175, and on 6000 images of Fashion-MNIST, of which students see 150.

    python examples/views_study.py prepare
    python examples/views_study.py train [--part photos-weak-300]
    python examples/views_study.py report

Every sweep continues where it was interrupted.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
import yaml
from PIL import Image

from cache_tools.console import command, print_line
from train.runs.result import load_result

ROOT = Path("runs/views-study")
SIDE, SEEDS = 20, 5
EPOCHS = {30: (1, 4, 16, 30), 300: (1, 4, 16, 300)}
PHOTOS = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field", "moon",
          "motorcycle_left", "rocket")  # fmt: skip
WEAK: list[dict[str, Any]] = [{"op": "pad-crop", "padding": 2}, {"op": "flip"}]


def strong(side: int) -> list[dict[str, Any]]:
    """Random resized crops to `side` pixels, flips and RandAugment."""
    return [
        {"op": "random-resized-crop", "size": side, "scale": [0.25, 1.0]},
        {"op": "flip"},
        {"op": "rand-augment", "policy": "rand-m6-n1-mstd0.5"},
    ]


def views_of(kind: str, side: int) -> dict[str, Any]:
    """The `views` of a recipe: "weak", or "strong" with CutMix for half of the pairs."""
    if kind == "weak":
        return {"base_seed": 0, "ops": WEAK}
    mix = {"cutmix_alpha": 1.0, "probability": 0.5}
    return {"version": 2, "base_seed": 0, "ops": strong(side), "mix": mix}


class Images(NamedTuple):
    """A data set: its recipe, the side of its pictures, and the slices of the training split that networks see."""

    dataset: dict[str, Any]
    side: int
    teacher_split: str
    student_split: str


IMAGES = {
    "photos": Images(
        {"name": "folder", "data_dir": str(ROOT / "photos"), "image_size": SIDE}, SIDE, "train", "train[::16]"
    ),
    "fashion": Images({"name": "fashion-mnist"}, 28, "train[::10]", "train[::400]"),
}
KINDS = ("weak", "strong")
RESULTS = Path("benchmarks/results/views-study.jsonl")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Part(NamedTuple):
    """A sweep over the number of cached views and the seeds, for one data set, kind of views and number of epochs."""

    images: str
    views: str
    epochs: int

    @property
    def name(self) -> str:
        return f"{self.images}-{self.views}-{self.epochs}"

    @property
    def cache(self) -> Path:
        return ROOT / f"{self.images}-{self.views}.zarr"

    @property
    def folder(self) -> Path:
        return ROOT / "sweeps" / self.name


PARTS = [Part(*part) for part in product(IMAGES, KINDS, EPOCHS)]


@app.command()
@command
def prepare() -> None:
    """Write the photographs, train the two teachers, and build the four caches."""
    write_photos(ROOT / "photos", per_class=200)
    for name, images in IMAGES.items():
        recipe, teacher = ROOT / f"{name}-teacher.yaml", ROOT / f"{name}-teacher"
        write_recipe(recipe, {
            "name": f"{name}-teacher", "dataset": {**images.dataset, "split": images.teacher_split},
            "views": views_of("weak", images.side), "student": "resnet20", "loss": {"kind": "ce"}, "epochs": 12,
            "batch_size": 64, "optimiser": {"learning_rate": 0.1},
        })  # fmt: skip
        run("train-student", recipe, "--out", teacher)
        for kind in KINDS:
            build = ROOT / f"{name}-{kind}.yaml"
            write_recipe(build, {
                "name": f"{name}-{kind}", "dataset": {**images.dataset, "split": images.student_split},
                "views": views_of(kind, images.side), "num_views": max(EPOCHS), "teacher": {"name": str(teacher)},
                "clip": None, "out": str(ROOT / f"{name}-{kind}.zarr"),
            })  # fmt: skip
            run("build-cache", build)


@app.command()
@command
def train(
    part: Annotated[list[str] | None, typer.Option("--part", help="Only this part; may be repeated.")] = None,
) -> None:
    """Train all students of all parts, those of few epochs first."""
    for each in sorted(PARTS, key=lambda one: one.epochs):
        if part and each.name not in part:
            continue
        recipe = each.folder.with_suffix(".yaml")
        write_recipe(recipe, {
            "name": each.name, "cache": str(each.cache), "student": "resnet8",
            "loss": {"kind": "kd", "distill_weight": 1.0, "temperature": 2.0}, "optimiser": {"learning_rate": 0.1},
            "schedule": {"name": "cosine", "warmup_epochs": 2}, "epochs": each.epochs, "batch_size": 56,
            "evaluate_every": each.epochs, "compare_with_labels": False,
        })  # fmt: skip
        views = ",".join(map(str, EPOCHS[each.epochs]))
        run("sweep-students", recipe, "--grid", f"num_views={views}", "--seeds", SEEDS, "--workers", 1, "--out",
            each.folder)  # fmt: skip


@app.command()
@command
def report() -> None:
    """Write a line per run to the results, print a table, and draw docs/cached-views.png.

    Parts that were not trained here keep their lines.
    """
    before = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    runs = []
    for part in PARTS:
        old = [figures for figures in before if figures["part"] == part.name]
        runs += read_runs(part) if (part.folder / "trials").exists() else old
    RESULTS.write_text("".join(json.dumps(figures) + "\n" for figures in runs))
    for part in PARTS:
        own = [figures for figures in runs if figures["part"] == part.name]
        if own:
            print_line(table_row(part, own))
    draw(runs, Path("docs/cached-views.png"))


def read_runs(part: Part) -> list[dict[str, Any]]:
    """Top-1 and NLL on the test images after the last epoch, for each finished run of a part."""
    found = []
    for folder in sorted((part.folder / "trials").iterdir()):
        result = load_result(folder)
        if result is None or result.last is None:
            continue
        settings = yaml.safe_load((folder / "recipe.yaml").read_text())
        figures = {"top1": result.last.top1, "nll": result.last.nll}
        found.append({"part": part.name, "views": settings["num_views"], "seed": result.seed, **figures})
    return found


def table_row(part: Part, runs: list[dict[str, Any]]) -> str:
    """Mean ± sample standard deviation per number of views, and the difference from fresh views seed by seed."""
    fresh = {figures["seed"]: figures["top1"] for figures in runs if figures["views"] == part.epochs}
    cells = []
    for views in EPOCHS[part.epochs]:
        top1 = {figures["seed"]: 100 * figures["top1"] for figures in runs if figures["views"] == views}
        if len(top1) < 2:
            continue
        gains = [value - 100 * fresh[seed] for seed, value in top1.items() if seed in fresh]
        text = f"{views}: {statistics.mean(top1.values()):.2f} ± {statistics.stdev(top1.values()):.2f}"
        if views != part.epochs and len(gains) > 1:
            text += f" ({statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f})"
        cells.append(text)
    return f"{part.name} | " + " | ".join(cells)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Top-1 against the number of cached views: a panel per data set, a line per part, deviations over seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(IMAGES), figsize=(9.6, 4.0), layout="constrained")
    for axis, images in zip(axes, IMAGES, strict=True):
        for part in PARTS:
            groups: dict[int, list[float]] = {}
            for each in runs:
                if part.images == images and each["part"] == part.name:
                    groups.setdefault(each["views"], []).append(100 * each["top1"])
            groups = {views: values for views, values in sorted(groups.items()) if len(values) > 1}
            if groups:
                means = [statistics.mean(values) for values in groups.values()]
                spread = [statistics.stdev(values) for values in groups.values()]
                label = f"{part.views} views, {part.epochs} epochs"
                axis.errorbar(list(groups), means, spread, label=label, marker="o", capsize=3)
        axis.set(xscale="log", xlabel="cached views", ylabel="top-1, %", title=images)
        axis.set_xticks([1, 4, 16, 30, 300], labels=["1", "4", "16", "30", "300"])
        axis.set_xticks([], minor=True)
    figure.legend(
        *axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS) * len(EPOCHS), fontsize=8
    )
    figure.savefig(path, dpi=110)


def write_photos(root: Path, per_class: int) -> None:
    """Random square crops of 48 to 160 pixels at SIDE pixels, training from the left half and test from the right."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    samples = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    rng = np.random.default_rng(0)
    for name in (*PHOTOS, *samples):
        picture = samples.get(name)
        if picture is None:
            picture = np.asarray(Image.open(next(Path(data.__path__[0]).glob(f"{name}.*"))).convert("RGB"))
        middle = picture.shape[1] // 2
        for split, half in (("train", picture[:, :middle]), ("test", picture[:, middle:])):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(per_class if split == "train" else per_class // 4):
                size = int(rng.integers(48, min(160, *half.shape[:2]) + 1))
                top, left = (int(rng.integers(0, length - size + 1)) for length in half.shape[:2])
                crop = Image.fromarray(half[top : top + size, left : left + size])
                crop.resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(folder / f"{number:03}.png")


def write_recipe(path: Path, settings: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False))


def run(*words: object) -> None:
    """Run one of the project's commands; its output goes to the screen."""
    program, *arguments = map(str, words)
    if subprocess.run([str(Path(sys.executable).with_name(program)), *arguments]).returncode:
        sys.exit(2)


if __name__ == "__main__":
    app()
