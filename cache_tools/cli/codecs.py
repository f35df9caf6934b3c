"""`cache-tools fidelity, recode`: measure what other codecs would cost, and convert a cache to them. Runs no model."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from cache_tools.cli.options import CODEC_HELP, AsJson, BlockRows, Cache, NewFolder
from cache_tools.console import print_json, print_line, print_next, printable_json, warn
from cache_tools.errors import RecipeError
from cache_tools.home.sizes import size_and_time
from cache_tools.places import local_folder
from cache_tools.units import human_bytes


def fidelity_command(
    reference: Cache,
    codec: Annotated[
        list[str] | None, typer.Option("--codec", metavar="SPEC", help=f"What to measure, repeatable: {CODEC_HELP}.")
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option("--temperature", help="Temperature of the KD loss, repeatable. [default: 1 and 4]"),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=32, help="Number of samples, evenly spaced.")] = 8192,
    view: Annotated[
        int | None,
        typer.Option("--view", min=0, help="Number of the view. [default: the second complete one, or the first]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what other codecs would cost on a cache. Changes nothing.

    Shows bytes, and the errors of KD gradient, KL, top-1 and features.
    The reference is the decoded cache, so the error of the cache's own codec does not show. docs/codecs.md
    explains the figures.
    """
    from cache_tools.analysis.fidelity_table import GOOD, measure
    from cache_tools.reader import TeacherCache

    temperatures = tuple(temperature or (1.0, 4.0))
    if not all(0.0 < t < float("inf") for t in temperatures):
        raise RecipeError("bad --temperature", expected="a number above 0", found=temperatures)
    found = measure(TeacherCache.open(reference), tuple(codec or ()), temperatures=temperatures, rows=rows, view=view)
    if as_json:
        print(printable_json(found.model_dump_json(indent=2)))
        return
    from cache_tools.analysis.fidelity_text import print_costs

    print_costs(found)
    if (best := found.smallest_good) is not None and str(best.codecs) != found.reference:
        print_line(f"{best.spec} is the smallest that keeps KD gradient and features to {GOOD:.0%}.")
        print_next("cache-tools", "recode", reference, "--codec", best.spec)
    else:
        print_line(f"No smaller codec keeps KD gradient and features to {GOOD:.0%}: the cache is best as it is.")
        print_next("train-student", "--cache", reference)


def recode_command(
    reference: Cache,
    codec: Annotated[str | None, typer.Option("--codec", metavar="SPEC", help=f"The new codecs: {CODEC_HELP}.")] = None,
    logits: Annotated[
        str | None,
        typer.Option(
            "--logits", metavar="CODEC", help="Codec of the logits. Without --codec, the features keep theirs."
        ),
    ] = None,
    features: Annotated[str | None, typer.Option("--features", metavar="CODEC", help="Codec of the features.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the new cache. [default: NAME-CODEC]")] = None,
    out: NewFolder = None,
    block_rows: BlockRows = None,
    as_json: AsJson = False,
) -> None:
    """Convert a cache to other codecs, without its teachers. The cache itself is not changed.

    You can interrupt it: the same command continues. When the source has grown, it converts the new blocks.
    """
    from cache_tools.derive import codec_spec
    from cache_tools.derive.recode import recode
    from cache_tools.reader import TeacherCache

    cache = TeacherCache.open(reference)
    codecs, label = codec_spec.choose(cache.recipe, codec, logits, features)
    with warnings.catch_warnings():  # printed below, once
        warnings.filterwarnings("ignore", "(top-k|sampled) targets at temperature")
        done = recode(cache, codecs, name or f"{cache.manifest.name}-{label}", local_folder(out), block_rows=block_rows)
    for caution in filter(None, (done.caution, codecs.caution)):
        warn(caution)
    sizes = {"bytes": size_and_time(done.path)[0], "source_bytes": size_and_time(done.source)[0]}
    if as_json:
        print_json(done.model_dump(mode="json") | sizes)
        return
    there = f", {done.blocks_there} already there" if done.blocks_there else ""
    print_line(f"{_blocks(done.blocks)} converted{there}: {done.path}")
    if done.blocks_missing:
        print_line(f"{_blocks(done.blocks_missing)} not in {done.source} yet: run this again when the source has more")
    else:
        print_line(f"{human_bytes(sizes['bytes'])}, from {human_bytes(sizes['source_bytes'])}")
        if cache.recipe.views.made_by is None:
            print_next("train-student", "--cache", done.path)


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"
