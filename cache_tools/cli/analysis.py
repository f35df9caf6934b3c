"""`cache-tools stats, tune-fusion`: what the teachers said, and how to fuse them. Runs no model, trains nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from cache_tools.config import validate
from cache_tools.console import command
from cache_tools.errors import RecipeError

Reference = Annotated[
    str, typer.Argument(metavar="CACHE", help="A path, a URL, a name, or 4+ digits of a fingerprint.")
]
View = Annotated[str, typer.Option("--view", help="The number of one view, or all complete ones.")]
Temperature = Annotated[float, typer.Option("--temperature", help="All logits are divided by it.")]
Device = Annotated[str, typer.Option("--device", help="Where to compute: auto, cpu, cuda or cuda:N.")]


def add_commands(app: typer.Typer) -> None:
    """Make these functions commands of `cache-tools`."""
    app.command("stats")(command(stats_command))
    app.command("tune-fusion")(command(tune_command))


def stats_command(
    reference: Reference,
    view: View = "all",
    confident: Annotated[
        float, typer.Option("--confident", help="A prediction is confident from this probability on.")
    ] = 0.8,
    temperature: Temperature = 1.0,
    teacher_weight: Annotated[
        float | None, typer.Option("--teacher-weight", help="Fuse anew with this weight (component caches).")
    ] = None,
    clip_scale: Annotated[
        str | None, typer.Option("--clip-scale", help="Fuse anew: model, match or a number (component caches).")
    ] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", help="Write tables (parquet), pictures (PNG) and stats.json to this folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Analyse what the teachers of a cache said: accuracy, calibration, classes, disagreement, stability.

    For the teacher, CLIP and their fusion; a fused cache knows the fusion only. docs/analysis.md explains each figure.
    On images that the teacher was trained on, the teacher looks better than it is.
    """
    from cache_tools.analysis import stats
    from cache_tools.reader import TeacherCache
    from cache_tools.refusion import FusionChoice

    asked = {"teacher_weight": teacher_weight, "clip_scale": clip_scale_option(clip_scale)}
    choice = validate(FusionChoice, asked, where="options")
    views, cache = _views(view), TeacherCache.open(reference)
    folder = None if out is None else stats.Folder(out)
    found = stats.analyse(
        cache,
        views,
        confident=confident,
        temperature=temperature,
        choice=choice,
        device=device,
        keep=None if folder is None else folder.keep,
    )
    if folder is not None:
        from cache_tools.analysis.stats_plots import plot_all

        folder.write(found)
        plot_all(found, folder.path)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
        return
    from cache_tools.analysis.stats_text import print_stats

    print_stats(found)
    if folder is not None:
        print(f"Tables and pictures are in {folder.path}")


def tune_command(
    reference: Reference,
    weights: Annotated[
        str, typer.Option("--weights", help="Teacher weights to try: FIRST:LAST:STEP, or numbers with commas.")
    ] = "0:1:0.05",
    scales: Annotated[
        str | None,
        typer.Option(
            "--scales",
            help="CLIP scales to try: model, match, numbers, LOW:HIGH:COUNT (equal ratios), with commas. "
            "[default: model,match,1 and a grid around them]",
        ),
    ] = None,
    holdout: Annotated[
        float, typer.Option("--holdout", help="Share of the samples that choose nothing and judge the choice.")
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws the two parts.")] = 0,
    view: View = "all",
    temperature: Temperature = 1.0,
    device: Device = "auto",
    plot: Annotated[Path | None, typer.Option("--plot", help="Write the NLL surface as a picture (PNG).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Choose teacher weight and CLIP scale by the likelihood of the labels; trains nothing.

    Needs a cache of components. Choose on images that the teacher was not trained on, such as a cache of
    --set dataset.split='train[50000:]': on its own training images its likelihood flatters it.
    """
    from cache_tools.analysis import stats, tune, tune_grid
    from cache_tools.reader import TeacherCache

    if plot is not None:  # no minutes of work for a picture that cannot be written
        stats.make_folder(plot.parent)
    result = tune.tune_fusion(
        TeacherCache.open(reference),
        _views(view),
        weights=tune_grid.parse_weights(weights),
        scales=None if scales is None else tune_grid.parse_scales(scales),
        holdout=holdout,
        seed=seed,
        temperature=temperature,
        device=device,
    )
    if plot is not None:
        from cache_tools.analysis.tune_plot import plot_surface

        plot_surface(result, plot)
    if as_json:
        print(json.dumps(tune.to_json(result), indent=2, ensure_ascii=False))
        return
    from cache_tools.analysis.tune_text import print_tuning

    print_tuning(result)
    if plot is not None:
        print(f"The surface is in {plot}")


def clip_scale_option(text: str | None) -> str | float | None:
    """`model`, `match`, or a number above 0."""
    if text in {None, "model", "match"}:
        return text
    try:
        number = float(str(text))
    except ValueError:
        number = math.nan
    if not 0.0 < number < math.inf:
        raise RecipeError("bad --clip-scale", expected="model, match or a number above 0", found=text)
    return number


def _views(text: str) -> list[int] | None:
    """None for all."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise RecipeError("bad --view", expected="the number of a view, or all", found=text)
    return [int(text)]
