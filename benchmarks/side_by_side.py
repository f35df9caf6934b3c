"""What the benchmarks share: variants timed alternately in one process, and compared round by round.

A machine's speed drifts with its clock and its other users, by far more than what is measured here. So each round times
every variant once, the order turns with every round, and a ratio is the median over rounds of ratios within a round.
"""

from __future__ import annotations

import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from cache_tools.console import resolve_device

Times = dict[str, list[float]]

Dataset = Annotated[str, typer.Option("--dataset", help="A build recipe: digits, fashion-mnist, or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a value of that recipe: --set dataset.split=test. Again for more."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Of torch on the CPU. Default: torch's own.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds of all variants, after one to warm up.")]
Views = Annotated[int, typer.Option("--views", min=2, help="Cached views to cycle through.")]


def prepared_device(name: str, threads: int | None) -> torch.device:
    """The device to run on; sets torch's threads where asked."""
    if threads is not None:
        torch.set_num_threads(threads)
    return resolve_device(name)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of `work`, all of its work on the device included, none that was queued before."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def interleaved(variants: Mapping[str, Callable[[int], float]], rounds: int) -> Times:
    """Seconds of each variant in each round; a first round, not counted, warms up.

    Args:
        variants: given the number of the round, from 0 with the warm-up, each does its work and says how long it took.
    """
    times: Times = {name: [] for name in variants}
    for number in range(rounds + 1):
        measured = {}
        with _no_garbage_collection():
            for name in _turned(list(variants), number):
                measured[name] = variants[name](number)
        if number > 0:
            for name, elapsed_s in measured.items():
                times[name].append(elapsed_s)
        print(f"round {number}/{rounds}: " + _listed(measured), file=sys.stderr, flush=True)
    return times


def ratios(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median of the ratios within rounds, and their quartiles: what the machine's noise leaves open."""
    low, median, high = np.quantile(np.divide(numerator, denominator), (0.25, 0.5, 0.75))
    return {"median": round(float(median), 4), "q1": round(float(low), 4), "q3": round(float(high), 4)}


def report(name: str, figures: Mapping[str, Any], times: Times, device: torch.device, clock: str) -> None:
    """Print the one JSON line of a benchmark: its figures, and what somebody needs to judge them."""
    medians = {variant: round(float(np.median(values)), 6) for variant, values in times.items()}
    rounds = len(next(iter(times.values())))
    line = {"benchmark": name, **figures, "rounds": rounds, "median_s": medians, "clock": clock, **_environment(device)}
    print(json.dumps(line), flush=True)


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu: {_cpu_name()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "timm", "open_clip_torch", "zarr")},
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _turned(names: list[str], number: int) -> list[str]:
    """Forwards and backwards in turn, so that a steady drift of the machine favours nobody."""
    return names if number % 2 == 0 else names[::-1]


def _listed(measured: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {elapsed_s:.3f} s" for name, elapsed_s in measured.items())


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect between rounds, not inside whichever variant happens to fill the counter."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
