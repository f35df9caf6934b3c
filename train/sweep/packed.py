"""Train the trials of a sweep on the GPUs of this machine, packed by their measured memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt

from cache_tools.config import Frozen
from cache_tools.console import warn
from cache_tools.errors import DeviceError
from cache_tools.system.memory import free_memory
from cache_tools.system.processes import command_for
from cache_tools.units import counted
from train.runs.outcome import Failure, is_settled
from train.sweep.halving import Halving
from train.sweep.packing import Packing, memory_key
from train.sweep.progress import SweepProgress
from train.sweep.recipe import Trial
from train.sweep.run import MEMORY
from train.sweep.workers import (
    OUT_OF_MEMORY,
    PEAK_BYTES,
    POLL_S,
    VISIBLE,
    check_images,
    end_processes,
    failure_of_process,
    raise_error,
    start_worker,
)
from train.weights.run_files import read_file, write_file

MEMORY_SHARE = 0.9  # of what is free on a GPU: torch's blocks and CUDA's kernels do not fit each other exactly


class PackedEngine:
    """An engine (`train.sweep.run.Engine`) of one process per trial, packed onto GPUs (`train.sweep.packing`).

    A process measures the memory of its trial after every epoch. The sweep's folder keeps the figures, so that the
    same command packs from the beginning when it resumes. A trial that runs out of memory, or whose process dies, is
    tried again alone on a GPU, from its last finished epoch. There it may fail.

    Args:
        budgets: bytes of each GPU that trials may take; GPUs as CUDA_VISIBLE_DEVICES calls them.
        folder: of the sweep. `workers.log` there has everything that the processes print.
        most: number of processes at a time.
    """

    def __init__(self, budgets: Mapping[str, int], folder: Path, most: int) -> None:
        self._budgets, self._folder, self._most = budgets, folder, most

    def __call__(self, streams: Sequence[Sequence[Trial]], halving: Halving | None) -> None:
        trials = [trial for stream in streams for trial in stream]
        check_images(trials)
        packing = Packing([memory_key(trial.recipe) for trial in trials], self._budgets, self._peaks(), self._most)
        running: dict[int, _Worker] = {}
        with SweepProgress(f"sweep, {counted(len(self._budgets), 'GPU')}", trials) as progress:
            try:
                while not packing.is_over:
                    while (start := packing.start()) is not None:
                        process = start_worker(
                            [trials[start.trial]],
                            halving,
                            self._folder,
                            start.gpu,
                            workers=(self._most, 1),
                            is_packed=True,
                        )
                        running[start.trial] = _Worker(process, start.gpu)
                    for number, worker in list(running.items()):
                        self._look(number, worker, packing)
                        if worker.has_ended:
                            del running[number]
                            self._end(trials[number], number, worker, packing)
                    progress.update()
                    time.sleep(POLL_S)
            finally:
                end_processes([worker.process for worker in running.values()])

    def _look(self, number: int, worker: _Worker, packing: Packing) -> None:
        """Take what a process has measured."""
        before = packing.peaks.get(packing.keys[number])
        for report in worker.new_reports():
            if PEAK_BYTES in report:
                packing.measure(number, report[PEAK_BYTES])
        if packing.peaks.get(packing.keys[number]) != before:
            data = _Peaks(bytes=packing.peaks).model_dump_json(indent=2)
            write_file(self._folder / MEMORY, data.encode())

    def _end(self, trial: Trial, number: int, worker: _Worker, packing: Packing) -> None:
        """A process has ended: its trial has ended too, or is tried again."""
        error = next((report[OUT_OF_MEMORY] for report in worker.reports if OUT_OF_MEMORY in report), None)
        if error is not None:
            if packing.retry_with_more_memory(number):
                warn(f"{trial.name} ran out of memory beside others on GPU {worker.gpu}: it is tried again alone")
            else:
                Failure(kind="memory", message=error).save(trial.folder)
        elif worker.process.returncode != 0 and not is_settled(trial.folder):
            if packing.retry(number):
                warn(f"the process of {trial.name} has died: it is tried again alone")
            else:
                failure_of_process(worker.process.returncode).save(trial.folder)
        else:
            packing.end(number)

    def _peaks(self) -> dict[str, int]:
        """What earlier commands have measured; nothing if the file is missing or damaged."""
        try:
            return _Peaks.model_validate_json(read_file(self._folder / MEMORY) or b"").bytes
        except ValueError:
            return {}


class _Peaks(Frozen):
    """The most memory that trials have held, by `memory_key`."""

    bytes: dict[str, NonNegativeInt]


class _Worker:
    """A process and what it has reported.

    Attributes:
        reports: one JSON object for each line of the process.
    """

    def __init__(self, process: subprocess.Popen[bytes], gpu: str) -> None:
        self.process, self.gpu, self.reports = process, gpu, list[dict[str, Any]]()
        self.has_ended = False
        self._begun_line = b""
        assert process.stdout is not None, "asked for a pipe"
        os.set_blocking(process.stdout.fileno(), False)

    def new_reports(self) -> list[dict[str, Any]]:
        """What has come since the last call.

        Raises:
            CacheError: the one that the process has reported, which concerns all trials.
        """
        assert self.process.stdout is not None, "asked for a pipe"
        self.has_ended = self.process.poll() is not None  # before reading: then nothing comes after
        *lines, self._begun_line = (self._begun_line + (self.process.stdout.read() or b"")).split(b"\n")
        if self.has_ended:
            self.process.stdout.close()
        raise_error(lines)
        new = [json.loads(line) for line in lines]
        self.reports += new
        return new


def measure_budgets(gpus: Sequence[str]) -> dict[str, int]:
    """The bytes of each GPU that trials may take together: most of what is free now.

    A process of its own asks CUDA, so that this one takes no memory of the GPUs.

    Raises:
        DeviceError: a GPU is not there, or does not answer.
    """
    asked = subprocess.run(
        command_for("train.sweep.packed"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=os.environ | {VISIBLE: ",".join(gpus)},
        check=False,
    )
    free = json.loads(asked.stdout) if asked.returncode == 0 else []
    if len(free) != len(gpus):
        lines = asked.stderr.decode(errors="replace").strip().splitlines()
        raise DeviceError(
            "cannot ask the GPUs for their free memory",
            where=f"{VISIBLE}={','.join(gpus)}",
            expected=counted(len(gpus), "GPU"),
            found=lines[-1] if asked.returncode and lines else len(free),
            next_step="leave --per-gpu auto out, or name the GPUs in CUDA_VISIBLE_DEVICES",
        )
    return {gpu: int(MEMORY_SHARE * num_bytes) for gpu, num_bytes in zip(gpus, free, strict=True)}


def main() -> None:
    """Print the free bytes of each visible GPU as one JSON list."""
    count = torch.cuda.device_count()
    json.dump([free_memory(torch.device("cuda", number)) for number in range(count)], sys.stdout)
