"""What several processes lose against processes that know nothing of each other, and what Ray costs per block.

`build`: two ranks of torchrun build one cache, against two processes at the same time that build half the views each,
into caches of their own. `train`: two ranks train one student (DistributedDataParallel over gloo), against two
processes that do as many steps on half the batch each. An efficiency is the time of the halves over that of the ranks;
1 is perfect. `ray_ms_per_block` is what a block costs more with one worker of Ray than in one process, and `ray` the
throughput of that worker over that of the process. Every process has one thread.

    python benchmarks/distributed.py --rounds 3
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from side_by_side import Cost, Dataset, Overrides, Rounds, environment, interleaved, ratios

from cache_tools.config import dump_yaml
from cache_tools.console import command
from pipeline.recipe import load_build_recipe

CLOCK = (
    "builds: the build loop, of Ray from the first worker's readiness to the last commit (`elapsed_s`); training: all "
    "epochs without evaluation (`train_s`). Of two processes the slower one counts. Starting processes, Ray and "
    "networks is not in it."
)
SETTINGS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", "--")
MODULES = {"build-cache": "pipeline.cli", "train-student": "train.cli"}


@command
def main(
    dataset: Dataset = "digits",
    views: Annotated[int, typer.Option("--views", min=2, help="Views of the whole cache; an even number.")] = 4,
    epochs: Annotated[int, typer.Option("--epochs", min=2, help="Epochs of the ranks; an even number.")] = 2,
    batch_size: Annotated[int, typer.Option("--batch-size", min=2, help="Of the whole batch.")] = 128,
    block_rows: Annotated[int, typer.Option("--block-rows", min=64, help="Rows of a block.")] = 64,
    student: Annotated[str, typer.Option("--student", help="The student to train.")] = "resnet8",
    rounds: Rounds = 3,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Whether to time Ray, too.")] = True,
    overrides: Overrides = None,
) -> None:
    """Efficiency of two ranks, and Ray's overhead per block."""
    with tempfile.TemporaryDirectory() as folder:
        work = _Work(Path(folder), dataset, overrides or [], block_rows, student)
        work.run(["build-cache", work.recipe("trained", 2), "--json"])  # to train from
        half, steps = batch_size // 2, epochs // 2

        def train(size: int, count: int) -> list[str]:
            return [
                "train-student", dataset, "--cache", str(work.folder / "trained"), "--student", student,
                "--batch-size", str(size), "--epochs", str(count), "--device", "cpu", "--log", "none", "--json",
                "--set", f"evaluate_every={count}", "--no-compare-with-labels", "--overwrite",
            ]  # fmt: skip

        def build(name: str, count: int, *more: str) -> list[str]:
            return ["build-cache", work.recipe(name, count), "--json", *more]

        variants: dict[str, Callable[[int], Cost]] = {
            "build_ranks": lambda n: work.time("elapsed_s", [build(f"ranks-{n}", views)], ranks=True),
            "build_halves": lambda n: work.time(
                "elapsed_s", [build(f"half-{n}-{part}", views // 2) for part in range(2)]
            ),
            "build_one": lambda n: work.time("elapsed_s", [build(f"one-{n}", views)]),
            "train_ranks": lambda n: work.time(
                "train_s", [[*train(batch_size, epochs), "--out", str(work.folder / "ranks")]], ranks=True
            ),
            "train_halves": lambda n: work.time(
                "train_s", [[*train(half, steps), "--out", str(work.folder / f"half-{part}")] for part in range(2)]
            ),
        }
        if ray:
            on_ray = ("--engine", "ray", "--ray-address", "local", "--ray-workers", "1")
            variants["build_ray"] = lambda n: work.time("elapsed_s", [build(f"ray-{n}", views, *on_ray)])
        wall = interleaved(variants, rounds).wall
    blocks = views * -(-work.samples // block_rows)
    line = {
        "benchmark": "distributed",
        "build": ratios(wall["build_halves"], wall["build_ranks"]),
        "train": ratios(wall["train_halves"], wall["train_ranks"]),
        "ray": ratios(wall["build_one"], wall["build_ray"]) if ray else None,
        "ray_ms_per_block": _per_block(wall["build_ray"], wall["build_one"], blocks) if ray else None,
        "dataset": dataset, "samples": work.samples, "views": views, "blocks": blocks, "block_rows": block_rows,
        "student": student, "batch_size": batch_size, "epochs": epochs, "rounds": rounds,
        "median_s": {name: round(float(np.median(times)), 4) for name, times in wall.items()},
        "clock": CLOCK,
        **environment(torch.device("cpu")), "threads": 1, "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    print(json.dumps(line), flush=True)


def _per_block(ray_s: Sequence[float], one_s: Sequence[float], blocks: int) -> dict[str, float]:
    low, median, high = np.quantile(np.subtract(ray_s, one_s) / blocks * 1e3, (0.25, 0.5, 0.75))
    return {"median": round(float(median), 2), "q1": round(float(low), 2), "q3": round(float(high), 2)}


class _Work:
    """Commands in processes of their own, and their recipes in a temporary folder."""

    def __init__(self, folder: Path, dataset: str, overrides: list[str], block_rows: int, student: str) -> None:
        self.folder, self._dataset, self._overrides, self._block_rows = folder, dataset, overrides, block_rows
        self.samples = 0

    def recipe(self, name: str, views: int) -> str:
        """A file with the recipe of a new cache of so many views."""
        options = {"out": str(self.folder / name), "num_views": views, "device": "cpu"}
        options |= {"preflight_samples": 0, "block_rows": self._block_rows}
        file = self.folder / f"{name}.yaml"
        file.write_text(dump_yaml(load_build_recipe(self._dataset, self._overrides, options)))
        return str(file)

    def run(self, words: list[str]) -> None:
        self.time("elapsed_s", [words])

    def time(self, figure: str, commands: Sequence[list[str]], *, ranks: bool = False) -> Cost:
        """The largest figure of commands that run at the same time."""
        running = [self._start(words, ranks=ranks) for words in commands]
        results = []
        for process in running:
            out, err = process.communicate()
            if process.returncode:
                raise RuntimeError(err[-3000:])
            results.append(json.loads(out[out.index("{") :]))
        self.samples = max(self.samples, *(result.get("num_samples", 0) for result in results), 0)
        return Cost(max(result[figure] for result in results), 0.0)

    def _start(self, words: list[str], *, ranks: bool) -> subprocess.Popen[str]:
        program = f"import torch; torch.set_num_threads(1); from {MODULES[words[0]]} import main; main()"
        own = [sys.executable, "-c", program, *words[1:]]
        all_words = [sys.executable, *TORCHRUN, *own] if ranks else own
        environ = os.environ | SETTINGS | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(all_words, env=environ, cwd=self.folder, **pipes)  # type: ignore[call-overload]


if __name__ == "__main__":
    typer.run(main)
