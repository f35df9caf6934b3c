"""`cache-tools pack-images`: a folder of images as tar shards with an index. Imports neither torch nor zarr."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cache_tools import units
from cache_tools.cli.options import AsJson
from cache_tools.console import print_json, print_line
from cache_tools.errors import RecipeError
from cache_tools.units import human_bytes


def pack_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of images, or a Hugging Face data set.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder of the shards.")],
    max_side: Annotated[
        int | None,
        typer.Option("--max-side", min=8, max=1 << 15, help="Make larger images so small. Default: files as they are."),
    ] = None,
    quality: Annotated[
        int | None, typer.Option("--quality", min=1, max=100, help="JPEG quality of these. Default: 90.")
    ] = None,
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Begin another shard beyond this size: 200MB, 1GB.")
    ] = "1GB",
    sub_folders: Annotated[
        str | None, typer.Option("--sub-folders", help="What sub-folders of class folders are: merge or classes.")
    ] = None,
    class_order: Annotated[
        str, typer.Option("--class-order", help="sorted, natural, case-blind, reversed, or a file of class names.")
    ] = "sorted",
    on_bad_image: Annotated[
        str,
        typer.Option(
            "--on-bad-image", help="error, or skip: decode every image, and leave out those that are damaged."
        ),
    ] = "error",
    as_json: AsJson = False,
) -> None:
    """Pack a folder of images into tar shards.

    An index beside them says where each image lies. A million images then need a few open files instead of a million.
    """
    # Imported here: --help must answer at once.
    from cache_tools.images.class_names import ORDERS, read_names
    from cache_tools.images.pack import MIN_SHARD_BYTES, pack_images

    if quality is not None and max_side is None:
        raise RecipeError("--quality is for images that --max-side makes smaller", where="--quality")
    if sub_folders not in {None, "merge", "classes"}:
        raise RecipeError("bad --sub-folders", expected="merge or classes", found=sub_folders)
    if on_bad_image not in {"error", "skip"}:
        raise RecipeError("bad --on-bad-image", expected="error or skip", found=on_bad_image)
    shard_bytes = units.num_bytes(shard_size)
    if shard_bytes < MIN_SHARD_BYTES:
        raise RecipeError("bad --shard-size", expected="at least 1MB", found=shard_size)
    order = read_names(class_order, where="--class-order", orders=tuple(ORDERS))
    pack = pack_images(
        folder,
        out,
        max_side=max_side,
        quality=quality or 90,
        shard_bytes=shard_bytes,
        sub_folders=sub_folders,  # type: ignore[arg-type]
        class_order=order if isinstance(order, str) else tuple(order),
        skip_damaged=on_bad_image == "skip",
    )
    if as_json:
        print_json(pack.to_json())
        return
    for note in pack.notes:
        print_line(f"note: {note}")
    for name, split in pack.splits.items():
        shards = f"{len(split.shards):,} shard{'' if len(split.shards) == 1 else 's'}"
        line = f"{name}: {split.samples:,} images in {shards}, {human_bytes(sum(split.shards.values()))}"
        line += f", {split.reduced:,} of them made smaller" if max_side is not None else ""
        print_line(line + (" (packed before)" if pack.existed else ""))
        if split.unreadable:
            print_line(
                f"note: {split.unreadable:,} images of {name} have no size that can be read; they are packed too"
            )
    print_line(f"next: build-cache {shlex.quote(str(out))} --teacher …")
