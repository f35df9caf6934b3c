"""`sweep-students`: many students from one cache, in one command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from cache_tools.config import parse_yaml, validate
from cache_tools.console import command
from cache_tools.errors import RecipeError
from cache_tools.memory import keep_freed_memory
from train.recipe import load_train_recipe
from train.search_recipe import parse_range
from train.sweep_recipe import SweepRecipe, load_sweep

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
@command
def sweep_students(
    recipe: Annotated[
        str, typer.Argument(help="What trials have in common: a recipe of train-student, built-in or a YAML file.")
    ] = "digits",
    cache: Annotated[str | None, typer.Option("--cache", help="The cache: path, URL, name or fingerprint.")] = None,
    students: Annotated[
        str | None, typer.Option("--students", help="Separated by commas: resnet8x4,wrn_16_2,timm:NAME.")
    ] = None,
    losses: Annotated[
        str | None, typer.Option("--losses", help="Separated by commas, as for train-student --loss: richkd,kd,ce.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="How many, from the recipe's seed on.")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid", metavar="KEY=V1,V2", help="Values of a recipe key, or a range LOW..HIGH; may be repeated."
        ),
    ] = None,
    search: Annotated[
        int | None,
        typer.Option("--search", min=1, help="Try so many promising settings, not all: Optuna chooses them."),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the training images.")] = None,
    sweep_file: Annotated[
        Path | None,
        typer.Option("--sweep", help="A YAML file with students, losses, grid, seeds, or trials; options win."),
    ] = None,
    asha: Annotated[
        bool,
        typer.Option("--asha", help="Stop the worse trials early (asynchronous successive halving). Only for search."),
    ] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes. Default: what fills the CPU; one on a GPU.")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option("--engine", help="Where trials run: this machine, or a Ray cluster.")
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            help="HOST:PORT, auto or local. Default: RAY_ADDRESS, else a cluster that runs here, else a new one.",
        ),
    ] = None,
    ray_gpus: Annotated[
        float, typer.Option("--ray-gpus", min=0.01, help="GPUs of a Ray worker; 0.5 has two on each.")
    ] = 1.0,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Where the dataset's files are.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the sweep. Default: the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the sweep. Default: runs/sweep-NAME.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key, dotted, for all trials.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed trials again.")] = False,
    show_trials: Annotated[bool, typer.Option("--show-trials", help="List the trials and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all results as one JSON object.")] = False,
) -> None:
    """Train many students from one cache; those that see the same batches share them.

    A trial is a run of train-student and gives the same numbers. Interrupt it at any time: the same command goes on,
    and with more students, losses or seeds it trains those that are new.
    """
    options = {
        "cache": cache,
        "epochs": epochs,
        "device": device,
        "data_dir": str(data_dir) if data_dir else None,
    }
    stored = load_sweep(sweep_file) if sweep_file else {}
    source = stored.pop("recipe", None) or recipe
    base = load_train_recipe(source, [*_settings(stored.pop("set", {})), *(overrides or ())], options)
    data: dict[str, Any] = {"name": base.name, **stored, "base": base.model_dump(mode="json")}
    data |= {"students": _words(students)} if students else {}
    data |= {"losses": _words(losses)} if losses else {}
    data |= {"seeds": seeds} if seeds else {}
    if search is not None:
        data["search"] = {**(data.get("search") or {}), "trials": search}
    data |= _axes(grid or (), data.get("search"))
    data |= {"asha": {}} if asha and not data.get("asha") else {}
    data |= {"name": name} if name else {}
    sweep = validate(SweepRecipe, data, where=str(sweep_file or "options"))
    folder = out or Path("runs") / f"sweep-{sweep.name}"
    if ray_address is not None and engine != "ray":
        raise RecipeError(
            "an address without its engine", where=f"--ray-address {ray_address}", expected="--engine ray"
        )
    if show_trials:
        if sweep.search is not None:
            raise RecipeError("a search does not know its trials in advance", where="--show-trials")
        from train.sweep_recipe import make_trials

        for trial in make_trials(sweep, folder):
            print(trial.name)
        return
    cluster = {"address": ray_address, "gpus": ray_gpus} if engine == "ray" else None
    _run(sweep, folder, workers, cluster, retry_failed, as_json)


def _run(
    sweep: SweepRecipe,
    folder: Path,
    workers: int | None,
    cluster: dict[str, Any] | None,
    retry_failed: bool,
    as_json: bool,
) -> None:
    import sys

    from cache_tools.console import resolve_device
    from train.sweep_run import Engine, default_workers, run_sweep
    from train.sweep_text import sweep_text
    from train.sweep_workers import Processes

    keep_freed_memory()
    say = lambda text: print(text, file=sys.stderr if as_json else sys.stdout, flush=True)  # noqa: E731
    with ExitStack() as stack:
        engine: Engine | None = None
        if cluster is not None:
            from train.sweep_ray import OnRay

            engine = stack.enter_context(OnRay(folder, **cluster, workers=workers, say=say))
        elif (count := workers or default_workers(resolve_device(sweep.base.get("device", "auto")))) > 1:
            engine = Processes(count, folder)
        result = run_sweep(sweep, folder, engine=engine, retry_failed=retry_failed, say=say)
    if as_json:
        print(
            json.dumps(
                {
                    "folder": str(folder),
                    "trials": result.trials.to_dicts(),
                    "settings": result.settings.to_dicts(),
                    "best": result.best and result.best._asdict(),
                }
            )
        )
    else:
        print(sweep_text(result, sweep))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _axes(grid: Sequence[str], search: dict[str, Any] | None) -> dict[str, Any]:
    """`grid` and `search` of the options: ranges are for the search."""
    lists: dict[str, Any] = {}
    ranges: dict[str, Any] = {}
    for text in grid:
        key, _, values = text.partition("=")
        found = parse_range(values)
        if found is None:
            lists |= [_axis(text)]
        elif search is None:
            raise RecipeError("a range is for a search", where=f"--grid {text}", next_step="give --search N, or values")
        else:
            ranges[key.strip()] = found
    told = {"grid": lists} if lists else {}
    if search is not None and ranges:
        told["search"] = {**search, "space": {**search.get("space", {}), **ranges}}
    return told


def _axis(text: str) -> tuple[str, list[Any]]:
    key, separator, values = text.partition("=")
    if not separator or not key.strip() or not values.strip():
        raise RecipeError("not KEY=VALUE,VALUE", where=f"--grid {text}", expected="such as lr=0.05,0.1")
    return key.strip(), parse_yaml(f"[{values}]", "values that cannot be read", where=f"--grid {text}")


def _settings(data: dict[str, Any]) -> list[str]:
    """The `set` of a sweep file as overrides."""
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).strip().removesuffix('...').strip()}"
        for key, value in data.items()
    ]


def main() -> None:
    """Entry point of `sweep-students`."""
    app()


if __name__ == "__main__":
    main()
