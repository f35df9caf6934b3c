"""`cache-tools stats, tune-fusion`: analyse the teachers' targets, and choose how to fuse them. Trains nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache_tools.cli.options import AsJson, Cache, Device, Temperature, View, parse_clip_scale, parse_views
from cache_tools.console import print_json, print_line, print_next

if TYPE_CHECKING:
    from cache_tools.analysis.stats import StatsFolder
    from cache_tools.reader import TeacherCache
    from cache_tools.refusion import FusionChoice


def stats_command(
    reference: Cache,
    view: View = "all",
    confident: Annotated[
        float, typer.Option("--confident", help="Probability from which a prediction counts as confident.")
    ] = 0.8,
    temperature: Temperature = 1.0,
    teacher_weight: Annotated[
        float | None, typer.Option("--teacher-weight", help="Fuse again with this weight (component caches).")
    ] = None,
    clip_scale: Annotated[
        str | None, typer.Option("--clip-scale", help="Fuse again with model, match or a number (component caches).")
    ] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", help="Write tables (parquet), plots (PNG) and stats.json to this folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Analyse the targets of a cache. Trains nothing.

    Accuracy, calibration, confusions, disagreement of teacher and CLIP, stability over the views, suspicious labels.
    For the teacher, CLIP and their fusion; a fused cache has the fusion only. Where images may have several labels:
    average precision, cross entropy and calibration of each label. docs/analysis.md explains each figure.
    On images that the teacher was trained on, the teacher looks better than it is.
    """
    from cache_tools.analysis import stats
    from cache_tools.config import typed_settings, validate
    from cache_tools.reader import TeacherCache
    from cache_tools.refusion import FusionChoice
    from cache_tools.system.memory import keep_freed_memory

    options = {"teacher_weight": teacher_weight, "clip_scale": parse_clip_scale(clip_scale)}
    choice = validate(FusionChoice, options, where="options", typed=typed_settings((), options))
    views, cache = parse_views(view), TeacherCache.open(reference)
    keep_freed_memory()
    folder = None if out is None else stats.StatsFolder(out)
    if cache.recipe.dataset.multi_label:
        _label_stats(cache, views, confident, temperature, choice, device, folder, as_json)
        if not as_json:
            print_next("train-student", "--loss", "bce", "--cache", reference)
        return
    found = stats.analyse(
        cache,
        views,
        confident=confident,
        temperature=temperature,
        choice=choice,
        device=device,
        write_view=None if folder is None else folder.write_view,
    )
    if folder is not None:
        from cache_tools.analysis.stats_plots import plot_all

        folder.write(found)
        plot_all(found, folder.path)
    if as_json:
        print_json(found.to_dict())
        return
    from cache_tools.analysis.stats_text import print_stats

    print_stats(found)
    if folder is not None:
        print_line(f"Tables and plots are in {folder.path}")
    if len(found.about.sources) > 1:
        print_next("cache-tools", "tune-fusion", reference)
    elif cache.recipe.views.made_by is None:
        print_next("train-student", "--cache", reference)


def _label_stats(
    cache: TeacherCache,
    views: Sequence[int] | None,
    confident: float,
    temperature: float,
    choice: FusionChoice,
    device: str,
    folder: StatsFolder | None,
    as_json: bool,
) -> None:
    """`stats` of images with any number of labels: tables, but no plots."""
    from cache_tools.analysis.label_stats import analyse_labels
    from cache_tools.analysis.label_stats_text import print_label_stats

    found = analyse_labels(cache, views, confident=confident, temperature=temperature, choice=choice, device=device)
    if folder is not None:
        folder.write(found)
    if as_json:
        print_json(found.to_dict())
        return
    print_label_stats(found)
    if folder is not None:
        print_line(f"Tables are in {folder.path}")


def tune_command(
    reference: Cache,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", help="Teacher weights to try: FIRST:LAST:STEP, or numbers with commas. [default: 0:1:0.05]"
        ),
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option(
            "--scales",
            help="CLIP scales to try, with commas: model, match, numbers, LOW:HIGH:COUNT (equal ratios). "
            "[default: model,match,1 and a grid around them]",
        ),
    ] = None,
    holdout: Annotated[
        float, typer.Option("--holdout", help="Share of the samples that are held out to judge the choice.")
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the split into the two parts.")] = 0,
    view: View = "all",
    temperature: Temperature = 1.0,
    device: Device = "auto",
    plot: Annotated[Path | None, typer.Option("--plot", help="Plot the NLL surface to this file (PNG).")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose teacher weight and CLIP scale by likelihood. Trains nothing.

    With several teachers and no CLIP, or several CLIPs and no teacher, it chooses the share of each network. Needs a
    component cache. Choose on images that the teacher was not trained on, such as a cache of
    --set dataset.split='train[50000:]': on its own training images, the teacher's likelihood is too good.
    """
    from cache_tools.analysis import stats, tune, tune_grid
    from cache_tools.reader import TeacherCache
    from cache_tools.system.memory import keep_freed_memory

    if plot is not None:  # fail before the work starts if the plot cannot be written
        stats.make_folder(plot.parent)
    cache = TeacherCache.open(reference)
    keep_freed_memory()
    tune.require_choice(cache)
    if cache.recipe.only_group is not None:
        _refuse(
            {"--scales": scales, "--plot": plot}, "the cache has one group of networks: only their shares are tuned"
        )
        _tune_shares(cache, view, weights, holdout, seed, temperature, device, as_json)
        return
    result = tune.tune_fusion(
        cache,
        parse_views(view),
        weights=tune_grid.parse_weights(weights or "0:1:0.05"),
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
        print_json(tune.to_json(result))
        return
    from cache_tools.analysis.tune_text import print_tuning

    print_tuning(result)
    if plot is not None:
        print_line(f"The surface is in {plot}")


def _tune_shares(
    cache: TeacherCache,
    view: str,
    weights: str | None,
    holdout: float,
    seed: int,
    temperature: float,
    device: str,
    as_json: bool,
) -> None:
    from cache_tools.analysis import tune_grid, tune_shares
    from cache_tools.analysis.tune_text import print_shares

    result = tune_shares.tune_shares(
        cache,
        parse_views(view),
        weights=None if weights is None else tune_grid.parse_weights(weights),
        holdout=holdout,
        seed=seed,
        temperature=temperature,
        device=device,
    )
    if as_json:
        print_json(tune_shares.to_json(result))
    else:
        print_shares(result)


def _refuse(options: Mapping[str, object], reason: str) -> None:
    """Raise RecipeError for the first option that is given."""
    from cache_tools.errors import RecipeError

    for option, value in options.items():
        if value is not None:
            raise RecipeError(f"{reason}", where=option, found=value, next_step=f"leave {option} out")
