"""The command `train-student`: train a student from cached targets, or from labels alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cache_tools.console import command, print_json, print_line, run_app
from cache_tools.errors import printable
from cache_tools.system.memory import keep_freed_memory
from cache_tools.system.ranks import speaks_for_all
from train.options import (
    Cache,
    CheckpointEvery,
    Compile,
    DataDir,
    Device,
    DeviceMemory,
    Download,
    Epochs,
    HostMemory,
    MaxMinutes,
    OptionalRecipe,
    Overrides,
    PixelDisk,
    ResultAsJson,
    ShowRecipe,
    ShuffleWindow,
    StageBudget,
    SyncBatchNorm,
    TrainPrecision,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
@command
@speaks_for_all
def train_student(
    recipe: OptionalRecipe = None,
    cache: Cache = None,
    student: Annotated[
        str | None, typer.Option("--student", help="resnet8, …, timm:NAME, torchvision:NAME, or my.module:function.")
    ] = None,
    student_weights: Annotated[
        str | None,
        typer.Option(
            "--student-weights",
            help="What it starts from: a checkpoint, a run, or a pretrained tag of the library.",
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            "--loss",
            help="ce (labels alone, no cache), kd, dkd, standardised_kd, crd, richkd-l, richkd-f, richkd (kd and crd); "
            "for several labels per image bce, or bce-labels (labels alone).",
        ),
    ] = None,
    epochs: Epochs = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Images per step.")] = None,
    accumulate: Annotated[
        int | None, typer.Option("--accumulate", help="Batches per update (gradient accumulation).")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Highest learning rate of the schedule.")] = None,
    clip_grad_norm: Annotated[
        float | None, typer.Option("--clip-grad-norm", help="Largest norm of the gradients of an update.")
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option("--label-smoothing", help="Label smoothing of the CE term, 0 to 1.")
    ] = None,
    class_weights: Annotated[
        str | None,
        typer.Option("--class-weights", help="Of the CE term: balanced, numbers in class order, a file, or none."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of the first weights, the order and dropout.")
    ] = None,
    device: Device = None,
    precision: TrainPrecision = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run. Default: one per recipe below runs/.")
    ] = None,
    views: Annotated[
        int | None, typer.Option("--views", help="Use the first N views of the cache. Default: all.")
    ] = None,
    teacher_weight: Annotated[
        float | None,
        typer.Option("--teacher-weight", help="The teacher's share of the fused logits, 0 to 1 (component caches)."),
    ] = None,
    clip_scale: Annotated[
        str | None,
        typer.Option("--clip-scale", help="Scale of CLIP's logits: model, match or a number (component caches)."),
    ] = None,
    label_fraction: Annotated[
        float | None,
        typer.Option("--label-fraction", help="Part of each class that keeps its label; targets are for all."),
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    compare_with_labels: Annotated[
        bool | None,
        typer.Option(help="Also train the same student on labels alone and compare."),
    ] = None,
    pictures: Annotated[
        bool,
        typer.Option("--pictures", help="Also show samples in report.html, with what teachers and student say."),
    ] = False,
    shuffle_window: ShuffleWindow = None,
    stage_budget: StageBudget = None,
    checkpoint_every_minutes: CheckpointEvery = None,
    max_minutes: MaxMinutes = None,
    compile_mode: Compile = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Train while the cache is still being built: each epoch waits for its view."),
    ] = False,
    sync_batchnorm: SyncBatchNorm = None,
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    pixel_disk: PixelDisk = None,
    log: Annotated[
        str | None,
        typer.Option(
            "--log", help="tensorboard, mlflow, wandb (several: a,b) or none. Default: tensorboard where installed."
        ),
    ] = None,
    overrides: Overrides = None,
    list_students: Annotated[
        bool,
        typer.Option("--list-students", help="List the students and stop; --student PATTERN lists those that match."),
    ] = False,
    show_recipe: ShowRecipe = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over, whatever is in the folder.")] = False,
    as_json: ResultAsJson = False,
) -> None:
    """Train a student from cached targets, or from labels alone with --loss ce.

    Without arguments: the embedded default, from the cache that `build-cache` makes without arguments.
    With --cache and no recipe, the settings (student, epochs, learning rate) are those of the recipe digits, and the
    run is named after the cache.
    With a folder of images: from the cache of its name, or with --loss ce from its labels.
    You can interrupt it at any time: the same command resumes after the last finished epoch, or from the last
    checkpoint inside the next one (--checkpoint-every-minutes).
    torchrun --no-python --nproc-per-node 4 train-student … trains one student on four GPUs.
    """
    # Imported here, as everything slow below: --help must answer at once.
    if list_students:
        from train.zoo.catalogue import students_text

        print(students_text(student))
        return
    from cache_tools.config import dump_yaml
    from train.recipe.loading import DEFAULT_RECIPE, builtin_recipes, load_train_recipe, named_after_cache
    from train.recipe.loss import named_loss

    options = {
        "cache": cache,
        "student": student,
        "student_weights": student_weights,
        "loss": named_loss(loss) if loss else None,
        "epochs": epochs,
        "batch_size": batch_size,
        "optimiser.accumulate": accumulate,
        "optimiser.learning_rate": lr,
        "optimiser.clip_grad_norm": clip_grad_norm,
        "loss.label_smoothing": label_smoothing,
        "loss.class_weights": class_weights,
        "seed": seed,
        "device": device,
        "precision": precision,
        "num_views": views,
        "fusion.teacher_weight": teacher_weight,
        "fusion.clip_scale": _number_or_name(clip_scale),
        "label_fraction": label_fraction,
        "out": str(out) if out else None,
        "data_dir": str(data_dir) if data_dir else None,
        "download": True if download else None,
        "compare_with_labels": compare_with_labels,
        "shuffle_window": shuffle_window,
        "stage_budget": stage_budget,
        "checkpoint_every_minutes": checkpoint_every_minutes,
        "max_minutes": max_minutes,
        "compile": compile_mode,
        "follow": True if follow else None,
        "sync_batchnorm": sync_batchnorm,
        "pixels.device_memory": device_memory,
        "pixels.host_memory": host_memory,
        "pixels.disk": pixel_disk,
        "loggers": None if log is None else [name.strip() for name in log.split(",") if name.strip() != "none"],
    }
    loaded = load_train_recipe(recipe or DEFAULT_RECIPE, overrides or (), options)
    if recipe is None:
        loaded = named_after_cache(loaded)
    if show_recipe:
        print(dump_yaml(loaded), end="")
        return
    import sys

    from train import run
    from train.recipe.sources import folder_note, require_cache_of_folder
    from train.runs.advice import next_steps
    from train.runs.result import summary

    source = recipe or DEFAULT_RECIPE
    if (note := folder_note(source, builtin_recipes())) is not None:
        print_line(note, file=sys.stderr)
    if loaded.loss.needs_targets:
        require_cache_of_folder(source, builtin_recipes(), None if cache else loaded.cache)
    keep_freed_memory()
    result = run.train_student(loaded, overwrite=overwrite, pictures=pictures)
    if as_json:
        print_json(result.model_dump(mode="json") | {"gain_over_labels": result.gain_over_labels})
    else:
        print("\n".join([summary(result), *map(printable, next_steps(result))]))


def _number_or_name(text: str | None) -> str | float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def main() -> None:
    """Entry point of `train-student`."""
    run_app(app)


if __name__ == "__main__":
    main()
