"""`sweep-students`: train many students from one cache."""

from __future__ import annotations

import json
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cache_tools.console import command, print_line, run_app
from cache_tools.errors import DeviceError, RecipeError
from cache_tools.system.memory import keep_freed_memory
from cache_tools.system.ranks import own_rank, speaks_for_all
from train.options import (
    Cache,
    CheckpointEvery,
    Compile,
    DataDir,
    Device,
    DeviceMemory,
    Epochs,
    HostMemory,
    PixelDisk,
    RayAddress,
    RayGpus,
    ShuffleWindow,
    StageBudget,
)

if TYPE_CHECKING:
    from train.sweep.recipe import SweepRecipe

MAX_PER_GPU = 64
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
@command
@speaks_for_all
def sweep_students(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="The recipe that all trials share: a built-in train-student recipe, a YAML file, or a folder of "
            "images. Default: digits."
        ),
    ] = None,
    cache: Cache = None,
    students: Annotated[
        str | None, typer.Option("--students", help="Separated by commas: resnet8x4,wrn_16_2,timm:NAME.")
    ] = None,
    losses: Annotated[
        str | None, typer.Option("--losses", help="Separated by commas, as for train-student --loss: richkd,kd,ce.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Number of seeds, starting at the recipe's seed.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid", metavar="KEY=V1,V2", help="Values of a recipe key, or a range LOW..HIGH; may be repeated."
        ),
    ] = None,
    search: Annotated[
        int | None,
        typer.Option("--search", min=1, help="Number of settings to try instead of all; Optuna suggests them."),
    ] = None,
    epochs: Epochs = None,
    sweep_file: Annotated[
        Path | None,
        typer.Option("--sweep", help="A YAML file with recipe, students, losses, grid, seeds, or trials; options win."),
    ] = None,
    asha: Annotated[
        bool,
        typer.Option(
            "--asha", help="Stop the worse trials early (asynchronous successive halving): to choose, not to report."
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Number of processes. Default: as many as fill the CPU; one per GPU."),
    ] = None,
    per_gpu: Annotated[
        str | None,
        typer.Option(
            "--per-gpu",
            metavar="auto|N",
            help="Number of processes on each GPU; auto: one per trial, as many as fit by measured memory.",
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option("--engine", help="Where trials run: on this machine or on a Ray cluster.")
    ] = "local",
    ray_address: RayAddress = None,
    ray_gpus: RayGpus = None,
    shuffle_window: ShuffleWindow = None,
    stage_budget: StageBudget = None,
    checkpoint_every_minutes: CheckpointEvery = None,
    compile_mode: Compile = None,
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    pixel_disk: PixelDisk = None,
    device: Device = None,
    data_dir: DataDir = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the sweep. Default: the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the sweep. Default: runs/sweep-NAME.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key, dotted, for all trials; --grid wins."),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed trials again.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace runs of other settings or of another cache in the trials' folders."),
    ] = False,
    show_trials: Annotated[bool, typer.Option("--show-trials", help="List the trials and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all results as one JSON object.")] = False,
) -> None:
    """Train many students from one cache. Students that need the same batches share them.

    Each trial is a run of train-student, with the same numbers. Interrupt it at any time: the same command resumes,
    and with more students, losses or seeds it trains the new trials.
    """
    if not (rank := own_rank()).is_alone:
        raise RecipeError(
            "a sweep starts its own processes, one for each GPU: torchrun would train every trial several times",
            where=f"{rank.count} processes",
            next_step="start it without torchrun; --workers N sets the number of processes",
        )
    # Imported here, as everything slow below: --help must answer at once.
    from train.sweep.options import default_folder, read_sweep

    if engine == "ray" and not show_trials:
        from train.sweep.ray import require_ray

        require_ray()  # before torch is imported
    for option, value in (("--ray-address", ray_address), ("--ray-gpus", ray_gpus)):
        if value is not None and engine != "ray":
            raise RecipeError("this option needs the Ray engine", where=f"{option} {value}", expected="--engine ray")
    on_each = None if per_gpu is None else _on_each_gpu(per_gpu, workers, engine)
    options = {
        "cache": cache,
        "epochs": epochs,
        "shuffle_window": shuffle_window,
        "stage_budget": stage_budget,
        "checkpoint_every_minutes": checkpoint_every_minutes,
        "compile": compile_mode,
        "pixels.device_memory": device_memory,
        "pixels.host_memory": host_memory,
        "pixels.disk": pixel_disk,
        "device": device,
        "data_dir": str(data_dir) if data_dir else None,
    }
    sweep_keys = {
        "students": None if students is None else _words("--students", students),
        "losses": None if losses is None else _words("--losses", losses),
        "seeds": seeds,
        "name": name,
    }
    sweep = read_sweep(sweep_file, recipe, options, overrides or (), sweep_keys, grid or (), search, asha)
    folder = out or default_folder(sweep)
    if show_trials:
        if sweep.search is not None:
            raise RecipeError("a search does not know its trials in advance", where="--show-trials")
        from train.sweep.recipe import make_trials

        for trial in make_trials(sweep, folder):
            print_line(trial.name)
        return
    cluster = {"address": ray_address, "gpus": ray_gpus or 1.0} if engine == "ray" else None
    _run(sweep, folder, workers, on_each, cluster, retry_failed, overwrite, as_json)


def _run(
    sweep: SweepRecipe,
    folder: Path,
    workers: int | None,
    per_gpu: int | Literal["auto"] | None,
    cluster: dict[str, Any] | None,
    retry_failed: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    import sys

    from cache_tools.console import resolve_device
    from train.sweep.packed import PackedEngine, measure_budgets
    from train.sweep.run import Engine, default_workers, run_sweep
    from train.sweep.text import sweep_text
    from train.sweep.workers import ProcessEngine, visible_gpus

    keep_freed_memory()
    say = lambda text: print_line(text, file=sys.stderr if as_json else sys.stdout)  # noqa: E731
    with ExitStack() as stack:
        engine: Engine | None = None
        if cluster is not None:
            from train.sweep.ray.engine import RayEngine

            engine = stack.enter_context(RayEngine(folder, **cluster, workers=workers, say=say))
        else:
            chosen = sweep.base.get("device", "auto")
            device = resolve_device(chosen)
            gpus = visible_gpus(device, chosen)
            if per_gpu is not None and not gpus:
                raise DeviceError(
                    "this option needs a GPU that CUDA can use",
                    where=f"--per-gpu {per_gpu}",
                    found=f"--device {chosen}" if chosen != "auto" else f"no GPU, so the device is {device}",
                    next_step="leave it out; --workers sets the number of processes",
                )
            count = workers or len(gpus) * (per_gpu if isinstance(per_gpu, int) else 1) or default_workers(device)
            if per_gpu == "auto":
                most = workers or max(len(gpus), os.cpu_count() or 1)
                engine = PackedEngine(measure_budgets(gpus), folder, most)
            elif count > 1 or len(gpus) > 1:
                engine = ProcessEngine(count, folder, gpus)
        result = run_sweep(sweep, folder, engine=engine, retry_failed=retry_failed, overwrite=overwrite, say=say)
    if as_json:
        print(
            json.dumps(
                {
                    "folder": str(folder),
                    "trials": result.trials.to_dicts(),
                    "settings": result.settings.to_dicts(),
                    "best": result.best and result.best._asdict(),
                    "pixels": result.pixels,
                }
            )
        )
    else:
        print(sweep_text(result, sweep))


def _on_each_gpu(text: str, workers: int | None, engine: str) -> int | Literal["auto"]:
    """Parse `--per-gpu`. Raises RecipeError for anything else, or if another option contradicts it."""
    where = f"--per-gpu {text}"
    if engine == "ray":
        raise RecipeError("this option is for GPUs of this machine", where=where, next_step="use --ray-gpus")
    if text == "auto":
        return "auto"
    if not (re.fullmatch(r"[0-9]{1,4}", text) and 1 <= int(text) <= MAX_PER_GPU):
        raise RecipeError("not a number of processes", where=where, expected=f"auto, or 1 to {MAX_PER_GPU}")
    if workers is not None:
        raise RecipeError(
            "both options set the number of processes", where=f"{where} --workers {workers}", expected="one of them"
        )
    return int(text)


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise RecipeError("a list without names", where=f"{option} '{text}'", expected="names separated by commas")
    return words


def main() -> None:
    """Entry point of `sweep-students`."""
    run_app(app)


if __name__ == "__main__":
    main()
