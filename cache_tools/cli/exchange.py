"""`cache-tools import, export-hf`: targets that other tools computed, and caches for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from cache_tools.cli.options import CODEC_HELP, AsJson, Cache, NewFolder, View, parse_views
from cache_tools.console import print_json, print_line, print_next
from cache_tools.errors import RecipeError
from cache_tools.places import local_folder

if TYPE_CHECKING:
    from cache_tools.exchange.images import ImportRecipe
    from cache_tools.exchange.make import ImportedTargets, ImportResult
    from cache_tools.images.image_set import ImageSet

MIN_SHARD_BYTES = 1_000_000
Kind = Literal["logits-npz", "tinyvit", "ml-dr"]
_OPTIONS = {"--values": {"logits-npz"}, "--targets": {"tinyvit", "ml-dr"}, "--unmixed": {"tinyvit"}}


def import_command(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="What the files are: logits-npz (an .npz or parquet file), tinyvit (the folder of save_logits.py) or "
            "ml-dr (a reinforced dataset).",
        ),
    ],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The file or the folder of the targets.")],
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            help="The images: the name of a dataset (digits, cifar100), a folder, or a YAML file (dataset, views).",
        ),
    ],
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Where the dataset's files are.")] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            "--targets",
            help="Of stored views: mean (over the views of an image, for its clean view) or views (each as it is, with "
            "pixels that cannot be made again: not for training). [default: mean]",
        ),
    ] = None,
    unmixed: Annotated[
        bool, typer.Option("--unmixed", help="tinyvit: MixUp and CutMix were off when the logits were saved.")
    ] = False,
    values: Annotated[
        str | None, typer.Option("--values", help="logits-npz: logits or probabilities. [default: logits]")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="What to call the teacher; it identifies the cache too.")
    ] = None,
    codec: Annotated[str | None, typer.Option("--codec", help=f"How targets are stored: {CODEC_HELP}.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the cache. [default: the dataset's]")] = None,
    out: NewFolder = None,
    block_rows: Annotated[int | None, typer.Option("--block-rows", min=1, help="Rows per block.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="dataset.… and views.… of the recipe, dotted; may be repeated."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a cache of logits that another tool has computed.

    Students see the images of --dataset: clean, or as --set views.ops=… says. Rows are matched with them by name or
    number. You can interrupt it: the same command continues.
    """
    from cache_tools.exchange.images import read_import_recipe
    from cache_tools.exchange.make import import_targets
    from cache_tools.images import open_images

    if kind not in get_args(Kind):
        raise RecipeError("no such kind of files", where=kind, expected=", ".join(get_args(Kind)))
    for option, given in (("--values", values), ("--targets", targets), ("--unmixed", unmixed or None)):
        if given is not None and kind not in _OPTIONS[option]:
            raise RecipeError(f"{option} is for {' and '.join(sorted(_OPTIONS[option]))}", where=kind)
    _require("--values", values, ("logits", "probabilities"))
    _require("--targets", targets, ("mean", "views"))
    options = {"name": name, "dataset.data_dir": str(data_dir) if data_dir else None}
    recipe = read_import_recipe(dataset, overrides or [], options)
    if targets == "views" and recipe.views is not None:
        raise RecipeError(
            "the views are those of the files, and cannot be chosen", where="views", next_step="leave views out"
        )
    images = open_images(recipe.source)
    opened = _open(kind, source, recipe, images, targets or "mean", values or "logits", unmixed)
    done = import_targets(
        opened, recipe, images, teacher=teacher, codec=codec, path=local_folder(out), block_rows=block_rows
    )
    if as_json:
        print_json(done.model_dump(mode="json"))
    else:
        _print_result(done, opened)


def export_hf_command(
    reference: Cache,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder of the data set.")],
    view: View = "all",
    top: Annotated[
        int | None, typer.Option("--top", min=1, help="The so many most probable classes instead of all logits.")
    ] = None,
    features: Annotated[bool, typer.Option("--features", help="Also the fused features.")] = False,
    file_names: Annotated[
        bool, typer.Option("--file-names", help="Also the file of each image: opens the images of the cache.")
    ] = False,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="With --file-names: where the images are, if they were moved.")
    ] = None,
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Begin another parquet file beyond this size: 200MB, 1GB.")
    ] = "500MB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a cache as a Hugging Face data set.

    It is parquet files with a card. A row is what the teachers said of one view of one image. Top-k and sampled targets
    stay sparse. Choose a licence in the card before you publish it.
    """
    from cache_tools import units
    from cache_tools.exchange.hf_export import export_hf
    from cache_tools.reader import TeacherCache

    if data_dir is not None and not file_names:
        raise RecipeError("--data-dir is for the names of files", where="--data-dir", next_step="add --file-names")
    shard_bytes = units.num_bytes(shard_size)
    if shard_bytes < MIN_SHARD_BYTES:
        raise RecipeError("bad --shard-size", expected="at least 1MB", found=shard_size)
    done = export_hf(
        TeacherCache.open(reference),
        out,
        views=parse_views(view),
        top=top,
        features=features,
        file_names=file_names,
        data_dir=data_dir,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )
    if as_json:
        print_json(done.model_dump(mode="json"))
        return
    print_line(
        f"{units.counted(done.rows, 'row')} in {units.counted(done.shards, 'parquet file')}, "
        f"{units.human_bytes(done.bytes)}, split {done.split}: {', '.join(done.columns)}"
    )
    print_line(f"{done.path}: choose a licence in README.md before you publish it")


def _open(
    kind: str, source: Path, recipe: ImportRecipe, images: ImageSet, targets: str, values: str, unmixed: bool
) -> ImportedTargets:
    chosen: Any = targets
    if kind == "logits-npz":
        from cache_tools.exchange.logits_file import LogitsFile

        return LogitsFile(source, images, values, recipe.views)  # type: ignore[arg-type]
    if kind == "tinyvit":
        from cache_tools.exchange.tinyvit import TinyViTLogits

        return TinyViTLogits(source, images, chosen, unmixed=unmixed)
    from cache_tools.exchange.ml_dr import ReinforcedData

    return ReinforcedData(source, images, chosen)


def _require(option: str, given: str | None, known: tuple[str, ...]) -> None:
    if given is not None and given not in known:
        raise RecipeError(f"bad {option}", expected=" or ".join(known), found=given)


def _print_result(done: ImportResult, targets: ImportedTargets) -> None:
    for note in done.notes:
        print_line(f"note: {note}")
    if done.agreement is not None:
        print_line(f"the most probable class is the label of {done.agreement:.1%} of the samples (view 0)")
    there = f", {done.blocks_there} already there" if done.blocks_there else ""
    plural = "" if done.num_views == 1 else "s"
    print_line(
        f"cache {done.fingerprint[:12]}: {done.num_views} view{plural} of {done.num_samples:,} samples as "
        f"{done.codec}, {done.blocks} blocks imported{there}: {done.path}"
    )
    if targets.made_by is not None:
        print_next("cache-tools", "stats", done.path)
    elif done.kind == "logits":
        print_next("train-student", "--cache", done.path)
    else:
        print_next("train-student", "--cache", done.path, "--loss", "kd", "--set", "temperature=1")
