"""`cache-tools fuse`: make a fused cache from a component cache. No image goes through a network."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache_tools.cli.options import AsJson, BlockRows, Cache, Device, NewFolder, parse_clip_scale
from cache_tools.config import typed_settings, validate
from cache_tools.console import print_json, print_line, print_next, warn
from cache_tools.errors import RecipeError
from cache_tools.places import local_folder
from cache_tools.refusion import describe_fusion

if TYPE_CHECKING:
    from cache_tools.derive.fuse import Fused

_NUMBERS = re.compile(r"\d+(\s*,\s*\d+)*")


def fuse_command(
    reference: Cache,
    teacher_weight: Annotated[
        float | None, typer.Option("--teacher-weight", help="The teacher's share of the fused logits (α in the paper).")
    ] = None,
    feature_weight: Annotated[
        float | None, typer.Option("--feature-weight", help="The teacher's share of the fused features (λ).")
    ] = None,
    clip_scale: Annotated[
        str | None, typer.Option("--clip-scale", help="Scale of CLIP's logits: model, match or a number.")
    ] = None,
    teacher_weights: Annotated[
        str | None, typer.Option("--teacher-weights", help="Share of each teacher, with commas; they sum to 1.")
    ] = None,
    clip_weights: Annotated[
        str | None, typer.Option("--clip-weights", help="Share of each CLIP, with commas; they sum to 1.")
    ] = None,
    prompt_ensemble: Annotated[
        str | None, typer.Option("--prompt-ensemble", help="What is averaged: embedding, logits or probabilities.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            help="Numbers of the cache's prompt templates (0,3,5), or other templates: richkd, openai, siglip or a "
            "file. CLIP is loaded for templates that the cache does not have.",
        ),
    ] = None,
    codec: Annotated[
        str | None, typer.Option("--codec", help="How targets are stored, such as float16. Default: as in the source.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the new cache. [default: NAME-fused]")] = None,
    out: NewFolder = None,
    block_rows: BlockRows = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Make a fused cache from a component cache. Teacher weight, CLIP scale and prompts may be others.

    You can interrupt it: the same command continues. When the source has grown, it fuses the new blocks.
    """
    from cache_tools.derive.fuse import fuse
    from cache_tools.reader import TeacherCache
    from cache_tools.refusion import FusionChoice

    numbers, templates = _parse_prompts(prompts)
    options = {
        "teacher_weight": teacher_weight,
        "feature_weight": feature_weight,
        "clip_scale": parse_clip_scale(clip_scale),
        "teacher_weights": _parse_shares("--teacher-weights", teacher_weights),
        "clip_weights": _parse_shares("--clip-weights", clip_weights),
        "prompt_ensemble": prompt_ensemble,
        "prompts": numbers,
    }
    choice = validate(FusionChoice, options, where="options", typed=typed_settings((), options))
    with warnings.catch_warnings():  # printed below, once
        warnings.filterwarnings("ignore", "(top-k|sampled) targets at temperature")
        done = fuse(
            TeacherCache.open(reference),
            choice,
            templates=templates,
            codec=codec,
            name=name,
            out=local_folder(out),
            block_rows=block_rows,
            device=device,
        )
    if caution := done.manifest.recipe.codecs.caution:
        warn(caution)
    if as_json:
        print_json(_to_json(done))
    else:
        _print_result(done)


def _parse_prompts(text: str | None) -> tuple[list[int] | None, tuple[str, ...] | None]:
    """The value of `--prompts`: numbers of stored templates, or templates."""
    if text is None:
        return None, None
    if _NUMBERS.fullmatch(text.strip()):
        return [int(number) for number in text.split(",")], None
    from cache_tools import plugins

    return None, plugins.load("templates")(text)


def _parse_shares(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise RecipeError(
            f"bad {option}", expected="numbers with commas between, such as 0.5,0.5", found=text
        ) from error


def _to_json(done: Fused) -> dict[str, Any]:
    manifest = done.manifest
    return done.model_dump(mode="json", exclude={"manifest"}) | {
        "num_views": manifest.num_views,
        "num_samples": manifest.num_samples,
        "fusion": manifest.recipe.fusion.model_dump(mode="json"),
        "teacher_weights": manifest.recipe.teacher_weights,
        "clip_weights": manifest.recipe.clip_weights,
        "clip_scales": manifest.clip_scales,
        "templates": [clip.templates for clip in manifest.recipe.clips],
    }


def _print_result(done: Fused) -> None:
    templates = ", ".join(str(len(clip.templates)) for clip in done.manifest.recipe.clips)
    print(describe_fusion(done.manifest) + (f", {templates} prompt templates" if templates else ""))
    there = f", {done.blocks_there} already there" if done.blocks_there else ""
    print_line(f"{done.blocks} blocks fused{there}: {done.path}")
    if done.blocks_missing:
        print_line(f"{done.blocks_missing} blocks are not in {done.source} yet: run this again when they are")
    else:
        print_next("train-student", "--cache", done.path)
