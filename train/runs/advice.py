"""What to do after a run: the next commands, and what to try where labels alone were better."""

from __future__ import annotations

import shlex
from pathlib import Path

from cache_tools.errors import CacheError
from cache_tools.format.manifest import Manifest, build_command
from cache_tools.images.own_folder import read_own_folder
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.system.arguments import expand_user
from train.evaluate.metrics import Evaluation
from train.recipe import TrainRecipe
from train.recipe.loss import LABELS_ALONE
from train.runs.folder import RECIPE
from train.runs.result import RunResult, figures_of_teachers
from train.runs.stored import open_run

_FEW_VIEWS, _FEW_EPOCHS = 8, 60
_UNSETTLED_NLL = 5.0  # nats; that of an even guess among 148 classes


def next_steps(result: RunResult) -> list[str]:
    """The lines after the summary of a run."""
    lines = [*_after_a_loss(result), *_as_a_teacher(result)]
    if result.last is not None:
        lines.append(f"next: {_command('evaluate-student', result.folder)}")
    return [*lines, f"next: {_command('export-student', result.folder)}"]


def _after_a_loss(result: RunResult) -> list[str]:
    """What to try where the distilled student is worse than the same student on labels alone; empty otherwise."""
    gain = result.gain_over_labels
    if gain is None or gain >= 0.0:
        return []
    try:
        run, _ = open_run(result.folder)
    except CacheError:
        return []
    steps = [*_about_the_fusion(result, run.manifest, run.cache), *_about_the_run(result, run.recipe, run.manifest)]
    lines = [line for command, why in steps for line in (f"  # {why}", f"  {command}")]
    return [f"Labels alone are better by {-100 * gain:.2f} points on this seed. What to try:", *lines]


def _as_a_teacher(result: RunResult) -> list[str]:
    """The command that caches a network trained on labels alone as the teacher of its own folder of images."""
    if result.loss not in LABELS_ALONE:
        return []
    try:
        dataset = open_run(result.folder)[0].dataset
        place = dataset.data_dir
        is_folder = dataset.has_image_files and place is not None and expand_user(place).is_dir()
        found = read_own_folder(place) if is_folder and place is not None else None
    except CacheError:
        return []
    if found is None or dataset.data_dir is None:
        return []
    plain = DatasetRecipe.model_validate(found.dataset)
    size = {"image_size": dataset.image_size}
    if dataset.absolute() != plain.model_copy(update=size).absolute():  # its other settings belong in a recipe file
        return []
    options = [] if dataset.image_size == plain.image_size else ["--set", f"dataset.image_size={dataset.image_size}"]
    return [f"next: {_command('build-cache', _shortest(dataset.data_dir), '--teacher', result.folder, *options)}"]


def _about_the_fusion(result: RunResult, manifest: Manifest | None, cache: Path | str | None) -> list[tuple[str, str]]:
    top1 = figures_of_teachers(result.teachers)
    alone = [
        (figure, name) for key, name in (("teacher", "the teacher"), ("CLIP", "CLIP")) if (figure := top1.get(key))
    ]
    if manifest is None or cache is None or "fusion" not in top1 or len(alone) < 2:
        return []
    best, better = max(alone, key=lambda one: one[0])
    lost = 100 * (best - top1["fusion"])
    why = (
        f"the fusion is {lost:.2f} points below {better} alone" if lost > 0 else "another teacher weight and CLIP scale"
    )
    if manifest.recipe.store == "components":
        return [(_command("cache-tools", "tune-fusion", cache), why)]
    rebuild = build_command(manifest, "--store", "components")
    return [(rebuild, f"{why}: tune-fusion needs the two apart")] if lost > 0 and rebuild is not None else []


def _about_the_run(result: RunResult, recipe: TrainRecipe, manifest: Manifest | None) -> list[tuple[str, str]]:
    def again(suffix: str, *options: object) -> str:
        return _command("train-student", result.folder / RECIPE, *options, "--out", f"{result.folder}-{suffix}")

    steps = []
    if isinstance(result.last, Evaluation) and result.last.nll > _UNSETTLED_NLL:
        lower = recipe.optimiser.learning_rate / 5
        steps.append((again(f"lr{lower:g}", "--lr", f"{lower:g}"), "a lower learning rate: this NLL is very high"))
    steps += [(again("seed", "--seed", result.seed + 1), "another seed: one alone proves little")]
    if recipe.loss.needs_logits:
        cooler = recipe.loss.temperature / 2 if recipe.loss.temperature > 1.5 else 4.0
        steps.append((again(f"T{cooler:g}", "--set", f"temperature={cooler:g}"), "another temperature"))
    if result.epochs < _FEW_EPOCHS:
        longer = 3 * result.epochs
        steps.append((again(f"{longer}-epochs", "--epochs", longer), "more epochs"))
    if manifest is not None and manifest.num_views < _FEW_VIEWS:
        more = build_command(manifest, "--views", str(4 * manifest.num_views))
        if more is not None:
            moved = [] if recipe.data_dir is None else ["--data-dir", recipe.data_dir]
            steps.append((f"{more} {_command(*moved)}".rstrip(), "more views, then train again"))
    return steps


def _shortest(path: Path) -> Path:
    """A path below the working directory relative to it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _command(*words: object) -> str:
    return shlex.join(str(word) for word in words)
