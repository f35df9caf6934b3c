"""`cache-tools fidelity, recode`: what other codecs would cost, and converting a cache to them. Runs no model."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Annotated

import typer

from cache_tools.console import command
from cache_tools.errors import RecipeError
from cache_tools.home import registry
from cache_tools.places import local_folder
from cache_tools.units import human_bytes

Reference = Annotated[
    str, typer.Argument(metavar="CACHE", help="A path, a URL, a name, or 4+ digits of a fingerprint.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

SPEC = "a preset (float16, float32, compact, dense, coarse, top-k), a codec (fixed-step:step=1/48) or LOGITS+FEATURES"


def add_commands(app: typer.Typer) -> None:
    """Make these functions commands of `cache-tools`."""
    app.command("fidelity")(command(fidelity_command))
    app.command("recode")(command(recode_command))


def fidelity_command(
    reference: Reference,
    codec: Annotated[
        list[str] | None, typer.Option("--codec", metavar="SPEC", help=f"What to measure, may be repeated: {SPEC}.")
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option("--temperature", help="Of the KD loss, may be repeated. [default: 1 and 4]"),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=32, help="How many samples, evenly spaced.")] = 8192,
    view: Annotated[
        int | None, typer.Option("--view", min=0, help="Which view. [default: the second complete one, or the first]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what codecs would cost on a cache: bytes, KD gradient, KL, top-1, features; changes nothing.

    Everything is compared with what the cache holds, decoded: what its own codec has lost is not seen. docs/codecs.md
    explains the figures.
    """
    from cache_tools.analysis.fidelity_table import measure
    from cache_tools.reader import TeacherCache

    temperatures = tuple(temperature or (1.0, 4.0))
    if not all(0.0 < t < float("inf") for t in temperatures):
        raise RecipeError("bad --temperature", expected="a number above 0", found=temperatures)
    found = measure(TeacherCache.open(reference), tuple(codec or ()), temperatures=temperatures, rows=rows, view=view)
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    from cache_tools.analysis.fidelity_text import print_costs

    print_costs(found)


def recode_command(
    reference: Reference,
    codec: Annotated[str | None, typer.Option("--codec", metavar="SPEC", help=f"The new codecs: {SPEC}.")] = None,
    logits: Annotated[
        str | None, typer.Option("--logits", metavar="CODEC", help="Of the logits; without --codec the rest stays.")
    ] = None,
    features: Annotated[str | None, typer.Option("--features", metavar="CODEC", help="Of the features.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the new cache. [default: NAME-CODEC]")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Its folder. [default: in the cache home]")] = None,
    block_rows: Annotated[
        int | None, typer.Option("--block-rows", min=1, help="Rows per block. [default: those of the cache]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert a cache to other codecs, without its teachers. The cache itself stays as it is.

    Interrupt it at any time: the same command goes on where it stopped, and when the cache has grown it converts
    what is new.
    """
    from cache_tools.derive import codec_spec
    from cache_tools.derive.recode import recode
    from cache_tools.reader import TeacherCache

    cache = TeacherCache.open(reference)
    codecs, label = codec_spec.choose(cache.recipe, codec, logits, features)
    with warnings.catch_warnings():  # said below, once
        warnings.filterwarnings("ignore", "top-k targets at temperature")
        done = recode(cache, codecs, name or f"{cache.manifest.name}-{label}", local_folder(out), block_rows=block_rows)
    for caution in filter(None, (done.caution, codecs.caution)):
        print(f"warning: {caution}", file=sys.stderr)
    sizes = {"bytes": registry.size_and_time(done.path)[0], "source_bytes": registry.size_and_time(done.source)[0]}
    if as_json:
        print(json.dumps(done.model_dump(mode="json") | sizes, indent=2, ensure_ascii=False))
        return
    there = f", {done.blocks_there} were there" if done.blocks_there else ""
    print(f"{_blocks(done.blocks)} converted{there}: {done.path}")
    if done.blocks_missing:
        print(f"{_blocks(done.blocks_missing)} not in {done.source} yet: run this again when there is more")
    else:
        print(f"{human_bytes(sizes['bytes'])}, from {human_bytes(sizes['source_bytes'])}")


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"
