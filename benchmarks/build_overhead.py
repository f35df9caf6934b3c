"""The overhead of building: throughput of the build loop over that of bare forward passes.

Each round builds a whole cache (fused, float16) in a new temporary folder and, right before or after it, runs teacher
and CLIP over the same batches of ready view pixels. A build also loads images, makes views, fuses, writes and commits.
Most of that happens while the networks run. With `--compiled` the networks of both are compiled: those of the builds by
`build-cache --compile model`, before the clock starts, those of the bare passes once, in the same way.

    python benchmarks/build_overhead.py
    python benchmarks/build_overhead.py --dataset cifar100 --views 2 --batch-size 512 --device cuda
    python benchmarks/build_overhead.py --compiled --set precision=bfloat16 --device cuda
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from side_by_side import (
    Cost,
    Dataset,
    Device,
    Overrides,
    Rounds,
    Threads,
    Times,
    cost,
    interleaved,
    prepared_device,
    ratios,
    report,
)
from students import build_recipe

from cache_tools.console import command
from cache_tools.format.arrays import default_block_rows
from cache_tools.images import open_images
from cache_tools.images.image_set import ImageSet
from pipeline.build.cache import build_cache, resolve
from pipeline.networks.ensemble import TeacherEnsemble, load_ensemble
from pipeline.recipe import BuildRecipe

CLOCK = (
    "build: from the first image of the first block to the last commit on disk, without opening images and networks; "
    "bare: one forward pass of each network, from uint8 pixels on the device, per batch"
)


@command
def main(
    dataset: Dataset = "digits",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 256,
    views: Annotated[int, typer.Option("--views", min=1, help="Views to build in each round.")] = 4,
    rounds: Rounds = 7,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Compile the networks, of builds and bare passes.")
    ] = False,
    device_name: Device = "auto",
    threads: Threads = None,
    overrides: Overrides = None,
) -> None:
    """Throughput of a build over that of the bare forward passes."""
    device = prepared_device(device_name, threads)
    with tempfile.TemporaryDirectory() as folder:
        options = {"num_views": views, "batch_size": batch_size, "device": str(device)}
        options |= {"compile": "model" if compiled else "off"}
        recipe = build_recipe(dataset, overrides, Path(folder) / "cache", **options)
        images = open_images(recipe.dataset)
        ensemble = _load(recipe, images, device)
        batches = _view_batches(recipe, images, ensemble, batch_size)
        kept = _compiled(ensemble, batches, batch_size) if compiled else None
        costs = interleaved(
            {
                "build": lambda number: _build(recipe),
                "bare": lambda number: _bare(recipe, images, batches, device, kept),
            },
            rounds,
        )
    settings = {
        "dataset": dataset,
        "teacher": " + ".join(spec.name for spec in recipe.teachers),
        "clip": " + ".join(spec.name for spec in recipe.clips),
        "n": len(images) * views,
        "batch_size": batch_size,
        "views": views,
        "store": recipe.store,
        "precision": recipe.precision,
        "compiled": compiled,
        "codec": recipe.codec if isinstance(recipe.codec, str) else str(recipe.codec),
    }
    report("build_overhead", _figures, costs, settings, CLOCK, device)


def _figures(times: Times) -> dict[str, dict[str, float]]:
    return {"throughput": ratios(times["bare"], times["build"])}


def _build(recipe: BuildRecipe) -> Cost:
    """The cost of the build loop of a new cache, which is removed afterwards."""
    processor = 0.0

    def on_milestone(text: str) -> None:
        nonlocal processor
        processor = time.process_time()  # the last milestone is the start of the loop

    result = build_cache(recipe, on_milestone)
    build_cost = Cost(result.elapsed_s, time.process_time() - processor)
    assert result.images > 0, "nothing was built"
    shutil.rmtree(result.path)
    return build_cost


def _view_batches(
    recipe: BuildRecipe, images: ImageSet, ensemble: TeacherEnsemble, batch_size: int
) -> list[torch.Tensor]:
    """View pixels of every batch that a build of this recipe computes, on the device."""
    block_rows = recipe.block_rows or default_block_rows(resolve(recipe, images, ensemble))
    batches = []
    for view in range(recipe.num_views):
        for block in range(0, len(images), block_rows):
            end = min(block + block_rows, len(images))
            for start in range(block, end, batch_size):
                rows = slice(start, min(start + batch_size, end))
                pixels = torch.from_numpy(images.load(rows)).to(ensemble.device)
                batches.append(recipe.views.apply(pixels, range(rows.start, rows.stop), view))
    return batches


def _compiled(ensemble: TeacherEnsemble, batches: list[torch.Tensor], batch_size: int) -> TeacherEnsemble:
    """The same networks, compiled as a build compiles them; the compiler has run."""
    ensemble.compile_for(batch_size)
    ensemble.outputs(batches[0])
    return ensemble


def _bare(
    recipe: BuildRecipe,
    images: ImageSet,
    batches: list[torch.Tensor],
    device: torch.device,
    kept: TeacherEnsemble | None,
) -> Cost:
    """The cost of the networks alone, freshly loaded as in a build unless they are given."""
    ensemble = kept or _load(recipe, images, device)

    def forward() -> None:
        for pixels in batches:
            ensemble.outputs(pixels)

    return cost(forward, device)


def _load(recipe: BuildRecipe, images: ImageSet, device: torch.device) -> TeacherEnsemble:
    return load_ensemble(recipe.teachers, recipe.clips, recipe.fusion, images, recipe.dataset, device, recipe.precision)


if __name__ == "__main__":
    typer.run(main)
