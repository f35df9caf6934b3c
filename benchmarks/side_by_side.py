"""Shared by the benchmarks: time variants alternately in one process and compare them round by round.

A machine's speed drifts with its clock and its other users, by far more than the differences measured here. So each
round times every variant once, the order alternates, and a ratio is the median over rounds of ratios within a round.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

from cache_tools.console import cpu_model, device_name, resolve_device
from cache_tools.system.memory import keep_freed_memory

Times = dict[str, list[float]]  # variant → seconds in each round


class Cost(NamedTuple):
    """Wall-clock time of a piece of work, and processor time of all threads of this process.

    Processor time excludes other programs and the GPU, and counts background work in full.
    """

    wall_s: float
    processor_s: float


class Costs(NamedTuple):
    """The times of each variant in each round."""

    wall: Times
    processor: Times


Dataset = Annotated[str, typer.Option("--dataset", help="A build recipe: digits, fashion-mnist, or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a value of that recipe, e.g. dataset.split=test; may be repeated."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="torch's threads on the CPU. Default: torch's own choice.")
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds of all variants, after one warm-up round.")]
Student = Annotated[str, typer.Option("--student", help="Any name that train-student takes.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=2)]
Views = Annotated[int, typer.Option("--views", min=2, help="Cached views to cycle through.")]


def prepared_device(name: str, threads: int | None) -> torch.device:
    """The device to run on. Sets torch's threads, and sets up the process as the commands do."""
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    return resolve_device(name)


def cost(work: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.process_time) -> Cost:
    """The cost of `work`, including all of its work on the device and excluding earlier queued work.

    Args:
        clock: of processor time; `processor_s` includes the processes that this one has started.
    """
    _synchronise(device)
    start, processor = time.perf_counter(), clock()
    work()
    _synchronise(device)
    return Cost(time.perf_counter() - start, clock() - processor)


def processor_s() -> float:
    """Processor time of this process and of the processes that it has started, all threads."""
    total = time.process_time()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            if int(fields[1]) == os.getpid():
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def interleaved(variants: Mapping[str, Callable[[int], Cost]], rounds: int) -> Costs:
    """Time each variant in each round, after a warm-up round that is not counted.

    Args:
        variants: each takes the number of the round (the warm-up is 0), does its work, and returns the cost.
    """
    costs = Costs({name: [] for name in variants}, {name: [] for name in variants})
    for number in range(rounds + 1):
        measured = {}
        with _no_garbage_collection():
            for name in _alternating(list(variants), number):
                measured[name] = variants[name](number)
        if number > 0:
            for name, (wall_s, processor_s) in measured.items():
                costs.wall[name].append(wall_s)
                costs.processor[name].append(processor_s)
        print(f"round {number}/{rounds}: {_summary(measured)}", file=sys.stderr, flush=True)
    return costs


def ratios(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios within rounds; the quartiles show the noise of the machine."""
    low, median, high = np.quantile(np.divide(numerator, denominator), (0.25, 0.5, 0.75))
    return {"median": round(float(median), 4), "q1": round(float(low), 4), "q3": round(float(high), 4)}


def report(
    name: str,
    figures: Callable[[Times], dict[str, dict[str, float]]],
    costs: Costs,
    settings: Mapping[str, Any],
    clock: str,
    device: torch.device,
) -> None:
    """Print the JSON line of a benchmark: its figures, settings and environment.

    Args:
        figures: computes the ratios of a benchmark, called for wall-clock times and for processor times.
    """
    line = {
        "benchmark": name,
        **figures(costs.wall),
        "processor": figures(costs.processor),
        **settings,
        "rounds": len(next(iter(costs.wall.values()))),
        "median_s": _medians(costs.wall),
        "median_processor_s": _medians(costs.processor),
        "clock": clock,
        **environment(device),
    }
    print(json.dumps(line), flush=True)


def _medians(times: Times) -> dict[str, float]:
    return {variant: round(float(np.median(values)), 6) for variant, values in times.items()}


def environment(device: torch.device) -> dict[str, Any]:
    return {
        "device": device_name(device) if device.type == "cuda" else f"cpu: {cpu_model()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "timm", "open_clip_torch", "zarr")},
    }


def _alternating(names: list[str], number: int) -> list[str]:
    """Names forwards in even rounds and backwards in odd ones, so that a steady drift favours no variant."""
    return names if number % 2 == 0 else names[::-1]


def _summary(measured: Mapping[str, Cost]) -> str:
    return ", ".join(f"{name} {measured_cost.wall_s:.3f} s" for name, measured_cost in measured.items())


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect garbage between rounds, not inside the variant that happens to reach the threshold."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
