"""Decoding pictures: the decode service against the bare decoder, and one decode for all views against one for each.

The pictures are JPEGs of mixed sizes around 490 × 340, made from scikit-learn's photos. Each round times on them all:

- `service`: the processes of `cache_tools.decoding`, from files to the crops of one view in this process, as in all
  epochs but the first;
- `first`: the same as in builds and first epochs, where the contents of files are compared with their keys;
- `bare`: as many processes, each of which decodes its share with PIL into an array, and crops it, in a plain loop, from
  bytes in its own memory;
- `threads`: the same work in the threads of this process (`load_each`), which small jobs use;
- `once` and `passes`: the service with V views of one decode, and with a pass for each of these views.

`decode` and `crop` are the seconds that the two parts take in the bare loops, added up. They bound the gain of decoding
once: with d and r per picture it is at most V (d + r) / (d + V r).

`--enlarge 8` makes the sides of the pictures so many times as long, as in photographs of cameras, and adds `scaled`:
the throughput of the service with `decoding: scaled`, which decodes a part of their size, over that of `service`.

    python benchmarks/decode.py
    python benchmarks/decode.py --pictures 4000 --workers 16
    python benchmarks/decode.py --pictures 60 --enlarge 8 --smallest-area 0.25
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image
from side_by_side import Cost, Rounds, Times, interleaved, prepared_device, processor_s, ratios, report

from cache_tools.console import command
from cache_tools.decoding.service import DecodeService, start_loading
from cache_tools.images import open_images
from cache_tools.images.folder import FolderImages
from cache_tools.images.formats import decoder_versions
from cache_tools.images.index import num_workers
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.system.memory import keep_freed_memory
from cache_tools.views import ViewRecipe

CLOCK = (
    "service, threads, once, passes: from the first request to the last pixels in this process; bare: from the start "
    "of the loops to the end of the slowest; all with running processes. Processor time is that of all these processes"
)
REQUEST, LOOP = 128, 8  # pictures of a request to the service, and that a bare loop crops together
QUALITY = 90


@command
def main(
    pictures: Annotated[int, typer.Option("--pictures", min=1, help="Number of JPEGs.")] = 1000,
    size: Annotated[int, typer.Option("--size", min=8, help="Side of the crops.")] = 224,
    views: Annotated[int, typer.Option("--views", min=2, help="Views made of one decode.")] = 4,
    enlarge: Annotated[int, typer.Option("--enlarge", min=1, max=20, help="Enlarge the pictures.")] = 1,
    smallest_area: Annotated[float, typer.Option("--smallest-area", help="Of the crops, as a share.")] = 0.08,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes. Default: one per core.")] = None,
    rounds: Rounds = 7,
) -> None:
    """Throughput of the decode service over that of the bare decoder, and the gain of decoding once."""
    device = prepared_device("cpu", 1)
    count = num_workers() if workers is None else workers
    crop = {"op": "random-resized-crop", "size": size, "scale": [smallest_area, 1]}
    recipe, scaled = (
        ViewRecipe.model_validate({"version": 2, "ops": [crop], "decoding": kind}) for kind in ("full", "scaled")
    )
    with tempfile.TemporaryDirectory() as folder:
        images = _pictures(Path(folder), pictures, enlarge)
        service, bare = DecodeService(count), _Bare(images, recipe, count)
        try:
            costs = interleaved(
                {
                    "service": lambda number: _load(service, images, recipe, [number]),
                    "first": lambda number: _load(service, replace(images), recipe, [number]),
                    "bare": bare.cost,
                    "threads": lambda number: _load(None, images, recipe, [number]),
                    "once": lambda number: _load(service, images, recipe, range(views)),
                    "passes": lambda number: _passes(service, images, recipe, range(views)),
                    **({"scaled": lambda number: _load(service, images, scaled, [number])} if enlarge > 1 else {}),
                },
                rounds,
            )
        finally:
            service.close()
            bare.close()
        kilobytes = sum(os.path.getsize(file) for file in images.files) / pictures / 1e3
    for times, parts in zip(costs, zip(*bare.parts[1:], strict=True), strict=True):  # wall-clock, then processor times
        times["decode"], times["crop"] = [list(part) for part in zip(*parts, strict=True)]
    settings = {
        "n": pictures,
        "size": size,
        "views": views,
        "enlarge": enlarge,
        "smallest_area": smallest_area,
        "workers": count,
        "kilobytes": round(kilobytes, 1),
        "decoder": decoder_versions(),
    }
    report("decode", lambda times: _figures(times, views), costs, settings, CLOCK, device)


def _figures(times: Times, views: int) -> dict[str, dict[str, float]]:
    decode, crop = np.array(times["decode"]), np.array(times["crop"])
    possible = views * (decode + crop) / (decode + views * crop)
    gain = np.divide(times["passes"], times["once"])
    return {
        "throughput": ratios(times["bare"], times["service"]),
        "first_epoch": ratios(times["bare"], times["first"]),
        "in_threads": ratios(times["bare"], times["threads"]),
        "gain": ratios(times["passes"], times["once"]),
        "possible": ratios(possible.tolist(), [1.0] * len(possible)),
        "achieved": ratios(gain.tolist(), possible.tolist()),
        **({"scaled": ratios(times["service"], times["scaled"])} if "scaled" in times else {}),
    }


def _pictures(folder: Path, count: int, enlarge: int) -> FolderImages:
    from sklearn.datasets import load_sample_images

    photos, generator = [Image.fromarray(pixels) for pixels in load_sample_images().images], np.random.default_rng(0)
    target = folder / "train" / "photos"
    target.mkdir(parents=True)
    for number in range(count):
        photo = photos[number % len(photos)]
        width, height = int(generator.integers(360, 620)), int(generator.integers(260, 420))
        left, top = int(generator.integers(photo.width - width)), int(generator.integers(photo.height - height))
        crop = photo.crop((left, top, left + width, top + height))
        crop = crop.resize((enlarge * width, enlarge * height), Image.Resampling.BICUBIC) if enlarge > 1 else crop
        crop.save(target / f"{number:06}.jpg", quality=QUALITY)
    images = open_images(DatasetRecipe(name="folder", data_dir=folder, test_split=None))
    assert isinstance(images, FolderImages)
    return images


def _load(service: DecodeService | None, images: FolderImages, recipe: ViewRecipe, views: Sequence[int]) -> Cost:
    """Load these views of all pictures, with one request ahead as in a build."""
    start, before_s = time.perf_counter(), processor_s()
    wanted, ahead = [(recipe, view) for view in views], None
    for first in range(0, len(images), REQUEST):
        index = np.arange(first, min(first + REQUEST, len(images)))
        load = start_loading(service, images, index, index, wanted, pin=False)
        if ahead is not None:
            ahead()
        ahead = load
    assert ahead is not None, "there are pictures"
    ahead()
    return Cost(time.perf_counter() - start, processor_s() - before_s)


def _passes(service: DecodeService, images: FolderImages, recipe: ViewRecipe, views: Sequence[int]) -> Cost:
    costs = [_load(service, images, recipe, [view]) for view in views]
    return Cost(sum(cost.wall_s for cost in costs), sum(cost.processor_s for cost in costs))


class _Parts(NamedTuple):
    """Seconds that all bare loops together spent in decoding and in cropping."""

    decode_s: float
    crop_s: float


class _Bare:
    """Processes with a plain loop each over their share of the pictures.

    Attributes:
        parts: of each round, by wall-clock and by processor time.
    """

    def __init__(self, images: FolderImages, recipe: ViewRecipe, count: int) -> None:
        self.parts: list[tuple[_Parts, _Parts]] = []
        self._ends: list[Connection] = []
        context = multiprocessing.get_context("spawn")
        for number in range(count):
            end, other = context.Pipe()
            files = [str(file) for file in images.files][number::count]
            context.Process(target=_loop, args=(other, files, recipe), daemon=True).start()
            other.close()
            self._ends.append(end)
        for end in self._ends:
            end.recv()

    def cost(self, number: int) -> Cost:
        start, before_s = time.perf_counter(), processor_s()
        for end in self._ends:
            end.send(number)
        measured = [end.recv() for end in self._ends]
        wall, processor = (_Parts(*np.sum(parts, axis=0).tolist()) for parts in zip(*measured, strict=True))
        self.parts.append((wall, processor))
        return Cost(time.perf_counter() - start, processor_s() - before_s)

    def close(self) -> None:
        for end in self._ends:
            end.send(None)


def _loop(end: Connection, files: Sequence[str], recipe: ViewRecipe) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as in the processes of the service
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    contents = [Path(file).read_bytes() for file in files]
    end.send("ready")
    while (view := end.recv()) is not None:
        walls, processors = np.zeros(2), np.zeros(2)
        for first in range(0, len(contents), LOOP):
            before = time.perf_counter(), time.process_time()
            arrays = [_decode(data) for data in contents[first : first + LOOP]]
            between = time.perf_counter(), time.process_time()
            tensors = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
            recipe.crop(tensors, np.arange(first, first + len(arrays)), view)
            after = time.perf_counter(), time.process_time()
            walls += (between[0] - before[0], after[0] - between[0])
            processors += (between[1] - before[1], after[1] - between[1])
        end.send((walls.tolist(), processors.tolist()))


def _decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


if __name__ == "__main__":
    typer.run(main)
