"""Large caches: opening a run, the start of an epoch, its memory, and `cache-tools stats`, for several numbers of rows.

The caches are those of `large_cache.py`: everything but the repetition of encoded rows is that of a real cache. Each
measurement is a process of its own, in which imports are not timed:

- `open`: the data of a run as `train-student` opens them: the cache with all its commits, labels and keys compared with
  their digests and with those of the images, canaries. The images are made up: no files are listed;
- `start`: the order of an epoch, the targets of the first window of blocks (`--shuffle-window`), and the first batch;
- `whole`: the same without a window, with the targets of a whole view, where they fit into memory;
- `stats`: `cache-tools stats --json` of the view.

`memory_mb` is what each adds to the size of the process at its peak. `per_row` has the time of a row divided by that of
a row of the size before: 1 is flat, below 1 is cheaper by the row.

    python benchmarks/scale.py
    python benchmarks/scale.py --rows 128000,1280000 --rounds 5
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from large_cache import images_of, write_cache
from side_by_side import Threads, environment

from cache_tools.analysis.stats import analyse
from cache_tools.console import command
from cache_tools.errors import OutOfMemoryError
from cache_tools.files import HOME_VARIABLE
from cache_tools.reader import TeacherCache
from cache_tools.system.memory import keep_freed_memory
from train.data import open_data
from train.recipe import TrainRecipe
from train.recipe.pixels import PixelRecipe

CPU = torch.device("cpu")
BATCH = 256


@command
def main(
    rows: Annotated[
        str, typer.Option("--rows", help="Numbers of rows, with commas, ascending.")
    ] = "128000,1280000,10000000",
    classes: Annotated[int, typer.Option("--classes", min=7)] = 1000,
    window: Annotated[int, typer.Option("--window", min=1, help="Blocks of the shuffle window.")] = 16,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds; each measures every size once.")] = 3,
    most_stats: Annotated[
        int, typer.Option("--most-stats", help="Measure stats once, not in every round, from so many rows.")
    ] = 2_000_000,
    threads: Threads = None,
) -> None:
    """Print one JSON line of seconds, megabytes and ratios of seconds by row."""
    sizes = [int(number) for number in rows.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        os.environ[HOME_VARIABLE] = f"{folder}/home"
        paths = {size: Path(folder) / f"{size}.zarr" for size in sizes}
        for size, path in paths.items():
            write_cache(path, size, classes)
        found: dict[str, dict[int, list[dict[str, float]]]] = {}
        for number in range(rounds):
            for size in sizes if number % 2 == 0 else sizes[::-1]:
                for name in ("open", "start", "whole", "stats"):
                    if name == "stats" and number > 0 and size >= most_stats:
                        continue
                    figures = _in_process(paths[size], name, window, threads)
                    print(f"round {number + 1}/{rounds}: {size:,} rows, {name}: {figures}", file=sys.stderr, flush=True)
                    if figures is not None:
                        found.setdefault(name, {}).setdefault(size, []).append(figures)
        manifest = TeacherCache.open(paths[sizes[-1]]).manifest
    line = {
        "benchmark": "scale",
        "per_row": {name: _ratios(by_size) for name, by_size in found.items()},
        "seconds": _quartiles(found, "s"),
        "processor_seconds": _quartiles(found, "processor_s"),
        "memory_mb": _quartiles(found, "memory_mb"),
        "rows": sizes,
        "classes": classes,
        "block_rows": manifest.block_rows,
        "window": window,
        "batch_size": BATCH,
        "codec": str(manifest.recipe.codecs),
        "rounds": rounds,
        "clock": "each a process of its own, without its imports; encoded rows repeat, so reads are of the page cache",
        **environment(CPU),
    }
    print(json.dumps(line), flush=True)


def _in_process(path: Path, name: str, window: int, threads: int | None) -> dict[str, float] | None:
    context = multiprocessing.get_context("forkserver")  # has imported everything once, and done nothing else
    context.set_forkserver_preload(["__main__", "train.data", "cache_tools.analysis.stats", "zarr"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, path, name, window, threads).result()


def measure(path: Path, name: str, window: int, threads: int | None) -> dict[str, float] | None:
    """Seconds and megabytes of one piece of work; None if it does not fit into memory."""
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    with contextlib.redirect_stdout(io.StringIO()):
        work = _prepared(path, name, window)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
        before = _memory_mb("VmRSS")
        start, processor = time.perf_counter(), time.process_time()
        try:
            work()
        except OutOfMemoryError as error:
            print(error, file=sys.stderr)
            return None
    return {
        "s": time.perf_counter() - start,
        "processor_s": time.process_time() - processor,
        "memory_mb": _memory_mb("VmHWM") - before,
    }


def _prepared(path: Path, name: str, window: int) -> Callable[[], object]:
    """The work to measure, after everything that it starts from."""
    if name == "stats":
        return lambda: print(json.dumps(analyse(TeacherCache.open(path)).to_dict()))
    shuffle = None if name == "whole" else window
    decoded = PixelRecipe(device_memory=0, host_memory=0)  # pictures of this number do not stay in memory
    recipe = TrainRecipe(
        name="scale", cache=str(path), epochs=2, batch_size=BATCH, shuffle_window=shuffle, pixels=decoded
    )
    images = images_of(TeacherCache.open(path))
    if name == "open":
        return lambda: open_data(recipe, CPU, lambda dataset, split: images)
    data = open_data(recipe, CPU, lambda dataset, split: images)

    def start() -> object:
        feed = data.feed(recipe, CPU)
        batches = feed.epoch(0)
        return next(batches), batches  # the next window is being read

    return start


def _memory_mb(field: str) -> float:
    """The size of this process, in MB: now (VmRSS), or at its peak (VmHWM; `ru_maxrss` begins with the parent's)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) / 1000


def _ratios(by_size: dict[int, list[dict[str, float]]]) -> dict[str, float]:
    """The median seconds by row of each size over those of the size before."""
    per_row = {size: float(np.median([each["s"] for each in rounds])) / size for size, rounds in by_size.items()}
    sizes = sorted(per_row)
    pairs = zip(sizes[1:], sizes, strict=False)
    return {f"{size}/{before}": round(per_row[size] / per_row[before], 4) for size, before in pairs}


def _quartiles(found: dict[str, dict[int, list[dict[str, float]]]], key: str) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, by_size in found.items():
        for size, rounds in sorted(by_size.items()):
            low, median, high = np.quantile([each[key] for each in rounds], (0.25, 0.5, 0.75))
            figures = {"median": round(float(median), 3), "q1": round(float(low), 3), "q3": round(float(high), 3)}
            table.setdefault(name, {})[str(size)] = figures
    return table


if __name__ == "__main__":
    typer.run(main)
