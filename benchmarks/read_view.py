"""Reading a warm view of a cache into a ready tensor, against `numpy.load` of the same numbers and a copy.

    python benchmarks/read_view.py

A view of 50 000 × 100 float16 logits. `read_over_numpy` has the bar 2. `compact` gives the rate at which a view of
int16 codes is decoded to float32, in GB of float32 per second, with the bar 1.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from side_by_side import Cost, Rounds, Threads, Times, cost, interleaved, prepared_device, ratios, report

from cache_tools.codecs.presets import resolve_codecs
from cache_tools.console import command
from cache_tools.format.manifest import Manifest
from cache_tools.format.recipe import CacheRecipe
from cache_tools.reader import TeacherCache
from tests.support import cache_factory

CLASSES = 100


@command
def main(
    samples: Annotated[int, typer.Option("--samples", min=1)] = 50_000,
    rounds: Rounds = 9,
    threads: Threads = None,
) -> None:
    """Seconds of a warm read of a view, and of numpy's."""
    device = prepared_device("cpu", threads)
    rows = np.random.default_rng(0).normal(0, 4, (samples, CLASSES)).astype(np.float16)
    ready = torch.empty(samples, CLASSES, dtype=torch.float16)
    with tempfile.TemporaryDirectory() as folder:
        np.save(file := Path(folder) / "rows.npy", rows)
        caches = {codec: _cache(Path(folder) / f"{codec}.zarr", codec, samples) for codec in ("float16", "compact")}
        compact = caches["compact"].load_view(0, device, features=False)

        def read() -> None:
            targets = caches["float16"].load_view(0, device, features=False)
            ready.copy_(targets.arrays["fused_logits"])

        work: dict[str, Any] = {
            "numpy": lambda: ready.copy_(torch.from_numpy(np.load(file))),
            "read": read,
            "decode": lambda: compact.logits(slice(None)),
        }
        costs = interleaved({name: _timed(do, device) for name, do in work.items()}, rounds)
    decoded = 4 * samples * CLASSES / 1e9
    rate = [decoded / seconds for seconds in costs.wall["decode"]]
    settings = {"samples": samples, "classes": CLASSES, "decode_gb_per_s": round(float(np.median(rate)), 3)}
    report("read_view", _figures, costs, settings, "a warm view from zarr to a ready tensor", device)


def _timed(work: Any, device: torch.device) -> Any:
    def variant(number: int) -> Cost:
        return cost(work, device)

    return variant


def _figures(times: Times) -> dict[str, dict[str, float]]:
    return {"read_over_numpy": ratios(times["read"], times["numpy"])}


def _cache(path: Path, codec: Any, samples: int) -> TeacherCache:
    images = cache_factory.tiny_images(samples, CLASSES)
    manifest: Manifest = cache_factory.tiny_manifest(images, num_views=1, block_rows=8192, codec=codec, canaries=False)
    assert isinstance(manifest.recipe, CacheRecipe)
    assert resolve_codecs(codec, CLASSES) == manifest.recipe.codecs
    cache_factory.build(path, manifest, images)
    return TeacherCache.open(path)


if __name__ == "__main__":
    typer.run(main)
