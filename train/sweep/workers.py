"""Train the trials of a sweep in several processes on this machine. A process that dies affects no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cache_tools.console import interrupted_by_signals, print_line
from cache_tools.errors import CacheError, NotFoundError, OutOfMemoryError, error_from_data, error_to_data
from cache_tools.format.manifest import Manifest
from cache_tools.images import open_images
from cache_tools.images.shard_files import is_pattern
from cache_tools.storage import remote_url
from cache_tools.system import memory
from cache_tools.system.processes import command_for
from cache_tools.system.quiet import quiet_libraries
from train.run import run_device
from train.runs.outcome import Failure, is_settled
from train.sweep.halving import Halving, dataset_of
from train.sweep.progress import SweepProgress
from train.sweep.recipe import Trial
from train.sweep.streams import image_opener, train_stream

POLL_S, GRACE_S = 0.2, 20.0
VISIBLE = "CUDA_VISIBLE_DEVICES"
_CACHE_ERROR = 2  # exit status of a process that has reported an error that concerns all trials
# Keys of what a process reports.
ERROR, PEAK_BYTES, OUT_OF_MEMORY = "error", "peak_bytes", "out_of_memory"


class ProcessEngine:
    """An engine (`train.sweep.run.Engine`) of several processes, each with a share of the trials.

    A process may die: the system takes its memory, or native code crashes. Its trials continue from their checkpoints,
    each in a process of its own. A trial whose process dies again has failed.

    Args:
        count: number of processes at a time.
        logs: folder of `workers.log`, which has everything that they print.
        gpus: what CUDA_VISIBLE_DEVICES calls the GPUs that the processes share, each with one of them; empty to leave
            the choice to the recipe.
    """

    def __init__(self, count: int, logs: Path, gpus: Sequence[str] = ()) -> None:
        self._count, self._logs, self._gpus = count, logs, tuple(gpus)
        self._gpu_of: dict[subprocess.Popen[bytes], str] = {}

    def __call__(self, streams: Sequence[Sequence[Trial]], halving: Halving | None) -> None:
        waiting = deque((share, False) for share in divide_streams(streams, self._count))
        running: dict[subprocess.Popen[bytes], tuple[list[Trial], bool]] = {}
        trials = [trial for stream in streams for trial in stream]
        check_images(trials)
        with SweepProgress(f"sweep, {self._count} processes", trials) as progress:
            try:
                while waiting or running:
                    while waiting and len(running) < self._count:
                        share, is_retry = waiting.popleft()
                        running[self._start(share, halving)] = (share, is_retry)
                    for process in [process for process in running if process.poll() is not None]:
                        share, is_retry = running.pop(process)
                        waiting.extend((retry, True) for retry in self._retries(process, share, is_retry=is_retry))
                    progress.update()
                    time.sleep(POLL_S)
            finally:
                end_processes(running)

    def _start(self, share: Sequence[Trial], halving: Halving | None) -> subprocess.Popen[bytes]:
        gpu = self._free_gpu()
        on_device = -(-self._count // max(len(self._gpus), 1))
        process = start_worker(share, halving, self._logs, gpu, workers=(self._count, on_device))
        if gpu is not None:
            self._gpu_of[process] = gpu
        return process

    def _free_gpu(self) -> str | None:
        """The GPU with the fewest processes."""
        used = Counter(gpu for process, gpu in self._gpu_of.items() if process.returncode is None)
        return min(self._gpus, key=lambda gpu: used[gpu], default=None)

    def _retries(
        self, process: subprocess.Popen[bytes], share: Sequence[Trial], *, is_retry: bool
    ) -> list[list[Trial]]:
        """The shares to start again after a process has ended.

        Raises:
            CacheError: the one that the process printed, which concerns all trials.
        """
        assert process.stdout is not None, "asked for a pipe"
        with process.stdout as stream:
            raise_error(stream.readlines())
        unsettled = [trial for trial in share if not is_settled(trial.folder)] if process.returncode != 0 else []
        if is_retry and unsettled:
            failure_of_process(process.returncode).save(unsettled[0].folder)
            return []
        return [[trial] for trial in unsettled]


def check_images(trials: Sequence[Trial]) -> None:
    """Fail before a process starts if the folder or file of the images is missing, as opening them would."""
    manifests: dict[str, Manifest] = {}
    for trial in trials:
        try:
            dataset = dataset_of(trial, manifests).absolute()
        except NotFoundError:  # its cache is gone by now: the process says so
            continue
        place = dataset.data_dir
        if not (place is None or dataset.download or remote_url(place) or is_pattern(place) or place.exists()):
            open_images(dataset, dataset.split)


def start_worker(
    share: Sequence[Trial],
    halving: Halving | None,
    logs: Path,
    gpu: str | None,
    *,
    workers: tuple[int, int],
    is_packed: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a process that trains these trials. What it reports on its output is one JSON object per line.

    Args:
        logs: folder of `workers.log`.
        gpu: the one that the process sees, as CUDA_VISIBLE_DEVICES calls it; None for all.
        workers: processes on this machine, and on the same device, which share their memory for pixels.
        is_packed: report the memory of the trial, a single one, and give it back if that runs out.
    """
    logs.mkdir(parents=True, exist_ok=True)
    job = {
        "halving": None if halving is None else halving.model_dump(mode="json"),
        "trials": [trial.model_dump(mode="json") for trial in share],
        "workers": workers,
        "is_packed": is_packed,
    }
    with open(logs / "workers.log", "ab") as log:
        process = subprocess.Popen(
            command_for("train.sweep.workers"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=None if gpu is None else os.environ | {VISIBLE: gpu},
        )
    assert process.stdin is not None, "asked for a pipe"
    process.stdin.write(json.dumps(job).encode())
    process.stdin.close()
    return process


def raise_error(lines: Iterable[bytes]) -> None:
    """Raise the error, which concerns all trials, that is among the lines of a process."""
    for line in lines:
        if (data := json.loads(line).get(ERROR)) is not None:
            raise error_from_data(data)


def failure_of_process(returncode: int) -> Failure:
    """The failure of a trial whose process has ended twice."""
    end = f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
    cause = ", probably for lack of memory" if returncode == -9 else ""
    return Failure(kind="died", message=f"its process ended with {end}{cause}, twice")


def end_processes(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """End processes as Ctrl-C does, and kill those that take longer than GRACE_S to clean up."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + GRACE_S
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
    finally:  # also if another signal ends this wait
        for process in processes:
            process.kill()
        for process in processes:
            with process:  # waits for its end and closes its pipes
                pass


def divide_streams(streams: Sequence[Sequence[Trial]], count: int) -> list[list[Trial]]:
    """Divide streams among `count` workers. The last streams are cut if they would leave workers idle as a whole."""
    whole = len(streams) - len(streams) % count
    found = [list(stream) for stream in streams[:whole]]
    for stream in streams[whole:]:
        pieces = min(-(-count // (len(streams) - whole)), len(stream))
        size = -(-len(stream) // pieces)
        found += [list(stream[start : start + size]) for start in range(0, len(stream), size)]
    return found


def visible_gpus(device: torch.device, chosen: str) -> list[str]:
    """The GPUs of this machine that processes may share, as CUDA_VISIBLE_DEVICES names them.

    Args:
        device, chosen: of the recipe. A device with a number is that one alone: the list is empty, as for the CPU.
    """
    if device.type != "cuda" or ":" in chosen:
        return []
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return (named or [str(number) for number in range(torch.cuda.device_count())])[: torch.cuda.device_count()]


def main() -> None:
    """A worker process: train the trials that standard input names, and report to standard output (`start_worker`)."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what training prints goes to the log
    memory.keep_freed_memory()
    job = json.load(sys.stdin)
    trials = [Trial.model_validate(trial) for trial in job["trials"]]
    halving = None if job["halving"] is None else Halving.model_validate(job["halving"])

    def report(key: str, value: Any) -> None:
        print(json.dumps({key: value}), file=reports, flush=True)

    try:
        with interrupted_by_signals(), quiet_libraries():
            if job["is_packed"]:
                _train_packed(trials, halving, tuple(job["workers"]), report)
            else:
                train_stream(trials, halving=halving, open_split=image_opener(), workers=tuple(job["workers"]))
    except CacheError as error:
        print_line(f"error: {error}", file=sys.stderr)
        report(ERROR, error_to_data(error))
        raise SystemExit(_CACHE_ERROR) from error
    except KeyboardInterrupt as interrupt:  # of Ctrl-C, or from the process that started this one
        raise SystemExit(128 + getattr(interrupt, "number", signal.SIGINT)) from interrupt


def _train_packed(
    trials: Sequence[Trial], halving: Halving | None, workers: tuple[int, int], report: Callable[[str, Any], None]
) -> None:
    """Train a single trial beside those of other processes, and report its memory, or that this ran out."""
    device = run_device(trials[0].recipe)
    measure = lambda: report(PEAK_BYTES, memory.peak_memory(device))  # noqa: E731
    try:
        with memory.raise_on_out_of_memory(trials[0].name, "a smaller batch_size"):
            train_stream(
                trials,
                halving=halving,
                open_split=image_opener(),
                workers=workers,
                after_epoch=measure,
                keeps_memory_failures=False,
            )
    except OutOfMemoryError as error:
        print_line(f"error: {error}", file=sys.stderr)
        report(OUT_OF_MEMORY, str(error))
