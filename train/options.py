"""Command-line options that several commands share, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[
    str,
    typer.Argument(help="A built-in recipe (digits, fashion-mnist, cifar100), a YAML file, or a folder of images."),
]
OptionalRecipe = Annotated[
    str | None,
    typer.Argument(
        help="A built-in recipe (digits, fashion-mnist, cifar100), a YAML file, or a folder of images. Default: digits."
    ),
]
RunArgument = Annotated[Path, typer.Argument(help="A run folder of train-student, or a checkpoint file in one.")]

Cache = Annotated[str | None, typer.Option("--cache", help="The cache: a path, a URL, a name or a fingerprint.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Where the dataset's files are.")]
Download = Annotated[bool, typer.Option("--download", help="Download the dataset if it is not there.")]

CheckpointEvery = Annotated[
    float | None,
    typer.Option("--checkpoint-every-minutes", help="Also store a state inside epochs that often, for long epochs."),
]
MaxMinutes = Annotated[
    float | None,
    typer.Option(
        "--max-minutes",
        help="End after so many minutes, with exit code 75; nothing is lost, and the same command goes on.",
    ),
]
Compile = Annotated[
    str | None,
    typer.Option(
        "--compile", help="auto (off), off, model (torch.compile of student and loss) or step (CUDA graphs of updates)."
    ),
]
SyncBatchNorm = Annotated[
    bool | None,
    typer.Option(
        "--sync-batchnorm/--no-sync-batchnorm",
        help="Under torchrun: batch statistics of the whole batch, not of each process's part.",
    ),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        "--device-memory", metavar="SIZE", help="For pixels, of the training device. Default: 60 % of what is free."
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option("--host-memory", metavar="SIZE", help="For pixels, of this machine. Default: 60 % of what is free."),
]
PixelDisk = Annotated[
    str | None,
    typer.Option(
        "--pixel-disk", metavar="SIZE", help="For decoded pixels in the cache home, such as 20GB. Default: none."
    ),
]
ShuffleWindow = Annotated[
    int | None,
    typer.Option(
        "--shuffle-window", help="Shuffle within so many blocks of the cache at a time, for views beyond memory."
    ),
]
StageBudget = Annotated[
    str | None,
    typer.Option(
        "--stage-budget", metavar="SIZE", help="Of a remote cache: disk for its views, dropped after use. Default: all."
    ),
]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the training images.")]
ForwardBatchSize = Annotated[int | None, typer.Option("--batch-size", help="Images per forward pass.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
Precision = Annotated[
    str | None, typer.Option("--precision", help="float32, or bfloat16 / float16 (automatic mixed precision).")
]
TrainPrecision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="float32, or bfloat16 / float16 (automatic mixed precision); auto is bfloat16 on CUDA where it has it.",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        help="HOST:PORT, auto or local. Default: RAY_ADDRESS, else a cluster on this machine, else a new one.",
    ),
]
RayGpus = Annotated[
    float | None,
    typer.Option("--ray-gpus", min=0.01, help="GPUs per Ray worker; 0.5 puts two workers on a GPU. Default: 1."),
]

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key, dotted; may be repeated.")
]
ShowRecipe = Annotated[bool, typer.Option("--show-recipe", help="Print the full recipe and stop.")]
ResultAsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
ReportAsJson = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")]
