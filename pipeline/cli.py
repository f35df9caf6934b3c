"""`build-cache`: run a teacher and CLIP once over every (image, view) and store their fused targets."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cache_tools.console import command, print_line, run_app
from cache_tools.system.memory import keep_freed_memory
from cache_tools.system.ranks import speaks_for_all
from train.options import (
    DataDir,
    Device,
    Download,
    MaxMinutes,
    Overrides,
    Precision,
    RayAddress,
    RayGpus,
    RecipeArgument,
    ResultAsJson,
    ShowRecipe,
)

if TYPE_CHECKING:
    from cache_tools.format.manifest import Manifest
    from cache_tools.images.check import PictureSizes, SplitsCheck
    from pipeline.build.multilabel_preflight import MultiLabelPreflight
    from pipeline.build.preflight import Preflight
    from pipeline.recipe import BuildRecipe

_NETWORK_OPTIONS = {
    "teacher.weights": "--teacher-checkpoint",
    "clip.weights": "--clip-checkpoint",
    "clip.templates": "--prompts",
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
@command
@speaks_for_all
def build_cache(
    recipe: RecipeArgument = "digits",
    views: Annotated[
        int | None, typer.Option("--views", help="Number of views to cache. Raise it to add views to a cache.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Base seed of the views.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            help="resnet32x4 etc., timm:NAME, torchvision:NAME, my.module:function, a run of train-student, or none.",
        ),
    ] = None,
    teacher_checkpoint: Annotated[
        str | None,
        typer.Option("--teacher-checkpoint", help="The teacher's .safetensors or .pth file, or a pretrained tag."),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option("--clip", help="An open_clip model name, hf-hub:ORG/MODEL, local-dir:FOLDER, or none."),
    ] = None,
    clip_checkpoint: Annotated[
        str | None,
        typer.Option("--clip-checkpoint", help="A pretrained tag of open_clip, or a checkpoint file."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", help="Prompt templates: richkd (12), openai (80), siglip (1), or a file."),
    ] = None,
    teacher_weight: Annotated[
        float | None,
        typer.Option("--teacher-weight", help="Weight of the teacher in the fused logits, 0 to 1 (α in the paper)."),
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", help="What to store: fused, or components (teacher and CLIP separately).")
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option("--codec", help="How targets are stored: float16, float32, compact, dense, coarse or top-k."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="Folder of the cache, or a URL (s3://…, gs://…, az://…). A URL ending in .zarr is the cache itself, "
            "others hold several caches. Default: a folder in $TEACHER_CACHE_HOME (~/.cache/teacher-cache).",
        ),
    ] = None,
    device: Device = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            "--batch-size",
            metavar="N|auto",
            help="Images per forward pass. auto: as the cache was begun; for a new one on CUDA, the most that fit into "
            "memory. Default: 256.",
        ),
    ] = None,
    compile_mode: Annotated[
        str | None,
        typer.Option(
            "--compile",
            help="off, model (torch.compile of teacher and CLIP), or auto: as the cache was begun, off for a new one.",
        ),
    ] = None,
    views_at_once: Annotated[
        int | None,
        typer.Option(
            "--views-at-once",
            min=1,
            max=16,
            help="Views built together from one decoding of the images. 1 completes one view after the other, for "
            "students that follow the build. Default: up to 16.",
        ),
    ] = None,
    keep_views: Annotated[
        int | None,
        typer.Option(
            "--keep-views",
            min=1,
            metavar="K",
            help="Drop old views behind the slowest student that follows (train-student --follow), so that at most K "
            "are there at a time. Default: keep all.",
        ),
    ] = None,
    lease_minutes: Annotated[
        float | None,
        typer.Option(
            "--lease-minutes",
            help="With --keep-views: how long to wait for a student that was killed or lost. Default: 60.",
        ),
    ] = None,
    max_minutes: MaxMinutes = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option("--engine", help="Where blocks are computed: in this process, or in workers on a Ray cluster."),
    ] = "local",
    ray_address: RayAddress = None,
    ray_gpus: RayGpus = None,
    ray_workers: Annotated[
        int | None,
        typer.Option(
            "--ray-workers",
            min=1,
            max=100_000,
            help="Number of Ray workers. Default: as many as the cluster has room for, one per GPU if it has GPUs.",
        ),
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    precision: Precision = None,
    overrides: Overrides = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Time a few batches, print what the cache costs and when it pays off, and stop."),
    ] = False,
    plan_student: Annotated[
        str, typer.Option("--plan-student", help="With --plan: the student to train from the cache.")
    ] = "resnet8x4",
    plan_epochs: Annotated[
        int, typer.Option("--plan-epochs", min=1, help="With --plan: the epochs of that student.")
    ] = 240,
    check_images: Annotated[
        bool,
        typer.Option(
            "--check-images", help="Decode every image of the train and test splits, list those that are bad, and stop."
        ),
    ] = False,
    show_recipe: ShowRecipe = False,
    as_json: ResultAsJson = False,
) -> None:
    """Run a teacher and CLIP, or one of them alone, once over every (image, view) and store their fused targets.

    Without arguments it builds a demo cache: handwritten digits with a small teacher and CLIP, offline, in seconds.
    With a folder of images (photos/train/CLASS/, photos/test/CLASS/), give a --teacher, a --clip or both.
    You can interrupt it at any time: the same command continues where it stopped.
    """
    # Imported here, as everything slow below: --help must answer at once.
    from cache_tools.config import dump_yaml
    from pipeline.recipe import builtin_recipes, is_none, load_build_recipe
    from train.recipe.sources import folder_note

    stops = {"--plan": plan, "--check-images": check_images, "--show-recipe": show_recipe}
    cluster = _cluster(engine, ray_address, ray_gpus, ray_workers, [option for option, given in stops.items() if given])
    options: dict[str, Any] = {
        "num_views": views,
        "views.base_seed": seed,
        # --teacher replaces the whole teacher of the recipe: weights and normalisation belong to the network.
        "teacher": {"name": teacher} if teacher else None,
        "teacher.weights": teacher_checkpoint,
        "clip.name": clip,
        "clip.weights": clip_checkpoint,
        "clip.templates": prompts,
        "fusion.teacher_weight": teacher_weight,
        "store": store,
        "codec": codec,
        "out": out,
        "device": device,
        "batch_size": batch_size,
        "compile": compile_mode,
        "views_at_once": views_at_once,
        "keep_views": keep_views,
        "lease_minutes": lease_minutes,
        "max_minutes": max_minutes,
        "dataset.data_dir": str(data_dir) if data_dir else None,
        "dataset.download": True if download else None,
        "precision": precision,
    }
    reset = ["clip.weights=null"] if clip and not is_none(clip) and not clip_checkpoint else []
    for group, name in (("teacher", teacher), ("clip", clip)):
        if is_none(name):
            options = _without(group, options)
    loaded = load_build_recipe(recipe, [*reset, *(overrides or [])], options)
    if show_recipe:
        print(dump_yaml(loaded), end="")
    elif check_images:
        _check_images(loaded, as_json)
    elif plan:
        from pipeline.plan import make_plan

        estimate = make_plan(loaded, plan_student, plan_epochs)
        print(json.dumps(estimate.model_dump() | {"verdict": estimate.verdict}) if as_json else estimate)
    else:
        if (note := folder_note(recipe, builtin_recipes())) is not None:
            print_line(note, file=sys.stderr)
        _build(loaded, as_json, cluster)


def _cluster(
    engine: str, address: str | None, gpus: float | None, workers: int | None, stops: Sequence[str]
) -> dict[str, Any] | None:
    """The settings of the Ray engine; None for this process."""
    from cache_tools.errors import RecipeError

    if engine == "ray":
        if stops:
            raise RecipeError("this option builds nothing", where=stops[0], next_step="leave out --engine ray")
        return {"address": address, "gpus": gpus or 1.0, "workers": workers}
    for option, value in (("--ray-address", address), ("--ray-gpus", gpus), ("--ray-workers", workers)):
        if value is not None:
            raise RecipeError("this option needs the Ray engine", where=f"{option} {value}", expected="--engine ray")
    return None


def _without(group: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that leave out the teacher or the CLIP of a recipe, and with it the recipe's own weights of the two."""
    from cache_tools.errors import RecipeError
    from cache_tools.format.recipe import FusionRecipe

    for key, flag in _NETWORK_OPTIONS.items():
        if key.startswith(f"{group}.") and options.get(key) is not None:
            raise RecipeError(
                f"{flag} is about a network that is left out",
                where=f"--{group} none",
                found=options[key],
                next_step="leave it out",
            )
    only = FusionRecipe().for_groups(teachers=group != "teacher", clips=group != "clip")
    fields = ["teacher_weight", "feature_weight", *(("clip_scale", "prompt_ensemble") if group == "clip" else ())]
    others = {key: value for key, value in options.items() if value is not None and key.partition(".")[0] != group}
    return {group: "none"} | {f"fusion.{name}": getattr(only, name) for name in fields} | others


def _check_images(recipe: BuildRecipe, as_json: bool) -> None:
    """Print one table of every file that is not a sound image, and fail if a build would."""
    from cache_tools.errors import DataError
    from cache_tools.images import open_images
    from cache_tools.images.check import check_new_images, check_splits, picture_sizes
    from cache_tools.units import counted

    dataset = recipe.dataset.model_copy(update={"on_bad_image": "error"})
    splits = [open_images(dataset, split) for split in (None, *dataset.test_splits)]
    found = check_splits(*splits)
    view = recipe.views.crop_size or splits[0].image_size
    sizes = picture_sizes(splits, view)
    if as_json:
        print(json.dumps(found._asdict() | {"sizes": None if sizes is None else sizes._asdict()}))
    elif not found.images:
        print_line(f"{dataset.name} has no image files: nothing to check")
        return
    else:
        _print_bad_files(found)
    if found.damaged and recipe.dataset.on_bad_image == "error":
        raise DataError(
            f"{counted(len(found.damaged), 'damaged image')} of {found.images:,}",
            where=dataset.data_dir,
            next_step="replace or remove them, or leave them out with --set dataset.on_bad_image=skip",
        )
    if not found.damaged:
        check_new_images(*splits)  # class folders, and values whose range no image shows
    if not as_json:
        print_line(f"{counted(found.images - len(found.damaged), 'sound image')}")
        if sizes is not None:
            print_line(_about_sizes(sizes, view))


def _about_sizes(sizes: PictureSizes, view: tuple[int, int]) -> str:
    from cache_tools.units import counted, human_bytes

    smallest, median, largest = sizes.shorter_sides
    return (
        f"shorter sides of {smallest:,} to {largest:,} pixels, median {median:,}; {human_bytes(sizes.decoded_bytes)} "
        f"decoded; {counted(sizes.enlarged, 'image')} ({sizes.enlarged / sizes.images:.0%}) smaller than the views of "
        f"{view[0]} × {view[1]}, and enlarged for them"
    )


def _print_bad_files(found: SplitsCheck) -> None:
    import os

    from cache_tools.images.summary import common_root
    from cache_tools.screen import TextTable

    bad = {name: (reason, "damaged") for name, reason in found.damaged.items()}
    bad |= {name: (reason, "left out") for name, reason in found.left_out.items()}
    if not bad:
        return
    root = common_root(os.path.dirname(name) for name in bad)
    table = TextTable(["file", "reason", "is"], left=3, title=root)
    for name, cells in sorted(bad.items()):
        table.add_row(os.path.relpath(name, root), *cells)
    print(table.text())


def _build(recipe: BuildRecipe, as_json: bool, cluster: Mapping[str, Any] | None) -> None:
    from cache_tools.units import duration, human_bytes

    def say(text: str) -> None:
        print_line(text, file=sys.stderr if as_json else sys.stdout)

    if cluster is not None:
        from pipeline.build.ray.engine import build_on_ray

        result = build_on_ray(recipe, **cluster, say=say)
    else:
        from pipeline.build.cache import build_cache as build

        keep_freed_memory()
        result = build(recipe, say)
    manifest = result.manifest
    rate = result.images / result.elapsed_s if result.elapsed_s else 0.0
    if as_json:
        summary = {
            "path": str(result.path),
            "url": result.url,
            "fingerprint": manifest.fingerprint,
            "num_views": manifest.num_views,
            "num_samples": manifest.num_samples,
            "images_computed": result.images,
            "elapsed_s": round(result.elapsed_s, 3),
            "images_per_s": round(rate, 1),
            "bytes_moved": result.bytes_moved,
            "preflight": result.preflight.model_dump() if result.preflight else None,
            "folders": result.folders,
            **({"images_of_ranks": result.images_of_ranks} if result.images_of_ranks else {}),
        }
        print(json.dumps(summary))
        return
    if result.images:
        took = f"{duration(result.elapsed_s)} ({rate:,.0f} images/s)"
        print_line(f"computed {result.images:,} images, each view counted, in {took}")
    if result.images_of_ranks:
        shares = ("not ended" if count is None else f"{count:,} images" for count in result.images_of_ranks)
        print_line("; ".join(f"rank {number}: {share}" for number, share in enumerate(shares)))
    if result.url:
        mirrors = f"the local mirror is {result.path}"
        if cluster is not None:
            mirrors = "each node has a mirror of the blocks that it computed"
        print_line(f"{human_bytes(result.bytes_moved)} moved; {mirrors}")
    plural = "" if manifest.num_views == 1 else "s"
    print_line(
        f"cache {manifest.fingerprint[:12]}: {manifest.num_views} view{plural} of {manifest.num_samples:,} samples"
    )
    where = result.url or result.path
    for line in _about_fusion(result.preflight, manifest, where):
        print_line(line)
    print_line(f"next: {_next_step(recipe, manifest, where)}")


def _about_fusion(
    preflight: Preflight | MultiLabelPreflight | None, manifest: Manifest, where: str | Path
) -> Iterator[str]:
    """What to do about a fusion that is worse than the teacher or CLIP alone."""
    from cache_tools.format.manifest import build_command

    if preflight is None or (lost := preflight.lost_by_fusion) is None:
        return
    yield lost
    if manifest.recipe.store == "components":
        yield f"next: cache-tools tune-fusion {shlex.quote(str(where))}"
    elif (again := build_command(manifest, "--store", "components")) is not None:
        yield "This cache has the fusion only. `cache-tools tune-fusion` needs teacher and CLIP separately:"
        yield f"next: {again}"


def _next_step(recipe: BuildRecipe, manifest: Manifest, where: str | Path) -> str:
    """The command that trains from this cache, by its name only if that is a recipe of `train-student` and unique."""
    from cache_tools.config import builtin_names
    from cache_tools.home import registry
    from train.recipe.loading import builtin_recipes

    is_recipe = recipe.name in builtin_names(builtin_recipes()) and recipe.name == manifest.data_name
    train = f"train-student {recipe.name}" if is_recipe else "train-student"
    train += " --loss bce" if recipe.dataset.labels is not None else ""
    is_unique = len(list(registry.cache_home().glob(f"{recipe.name}-*{registry.SUFFIX}"))) == 1
    in_home = is_unique and recipe.out is None
    return train if is_recipe and in_home else f"{train} --cache {shlex.quote(recipe.name if in_home else str(where))}"


def main() -> None:
    """Entry point of the `build-cache` command."""
    run_app(app)


if __name__ == "__main__":
    main()
