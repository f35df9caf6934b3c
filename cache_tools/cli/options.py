"""Command-line arguments and options that several commands of `cache-tools` share, each defined once."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from cache_tools.errors import RecipeError

Cache = Annotated[str, typer.Argument(metavar="CACHE", help="A path, a URL, a name, or 4+ digits of a fingerprint.")]
LocalCache = Annotated[str, typer.Argument(metavar="CACHE", help="A path, a name, or 4+ digits of a fingerprint.")]
SourcePlace = Annotated[str, typer.Argument(help="Folder or URL of the cache.")]
TargetPlace = Annotated[
    str,
    typer.Argument(
        help="Folder or URL (s3://…, gs://…, az://…). If it ends in .zarr, it becomes the copy; "
        "else the copy goes inside."
    ),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it. Without this, only show what would be done.")]
Device = Annotated[str, typer.Option("--device", help="Where to compute: auto, cpu, cuda or cuda:N.")]

View = Annotated[str, typer.Option("--view", help="Number of one view, or all: every complete view.")]
Temperature = Annotated[float, typer.Option("--temperature", help="Divide all logits by this.")]

CODEC_HELP = (
    "a preset (float16, float32, compact, dense, coarse, top-k), a codec (fixed-step:step=1/48) or LOGITS+FEATURES"
)
NewFolder = Annotated[
    str | None, typer.Option("--out", help="Folder of the new cache. Default: its place in the cache home.")
]
BlockRows = Annotated[
    int | None, typer.Option("--block-rows", min=1, help="Rows per block. Default: as in the source.")
]


def parse_views(text: str) -> list[int] | None:
    """The value of `--view`; None for all views."""
    if text == "all":
        return None
    if not text.isdecimal() or len(text) > 10:
        raise RecipeError("bad --view", expected="the number of a view, or all", found=text)
    return [int(text)]


def parse_clip_scale(text: str | None) -> str | float | None:
    """The value of `--clip-scale`: `model`, `match`, or a number above 0."""
    if text in {None, "model", "match"}:
        return text
    try:
        number = float(str(text))
    except ValueError:
        number = math.nan
    if not 0.0 < number < math.inf:
        raise RecipeError("bad --clip-scale", expected="model, match or a number above 0", found=text)
    return number
