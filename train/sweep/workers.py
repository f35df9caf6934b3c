"""Share a sweep's trials among processes on this machine, and see to it that one that dies takes nothing with it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from cache_tools.errors import CacheError, StorageError
from train.runs.outcome import Failure, settled
from train.sweep.halving import Contest
from train.sweep.progress import SweepProgress
from train.sweep.recipe import Trial
from train.sweep.streams import opener, train_stream

POLL_S = 0.2
ERROR = "error: "


class Processes:
    """An engine (`sweep_run.Engine`) of several processes, each with a share of the trials.

    A process that dies (the system takes the memory back, a crash in native code) leaves checkpoints: its trials are
    started again, each in a process of its own, and the one that dies again is the one that failed.

    Args:
        count: of processes at a time.
        logs: folder for what they print.
    """

    def __init__(self, count: int, logs: Path) -> None:
        self._count, self._logs = count, logs

    def __call__(self, streams: Sequence[Sequence[Trial]], contest: Contest | None) -> None:
        waiting = deque((share, False) for share in shares(streams, self._count))
        running: dict[subprocess.Popen[bytes], tuple[list[Trial], bool]] = {}
        trials = [trial for stream in streams for trial in stream]
        with SweepProgress(f"sweep, {self._count} processes", trials) as progress:
            try:
                while waiting or running:
                    while waiting and len(running) < self._count:
                        share, alone = waiting.popleft()
                        running[self._start(share, contest)] = (share, alone)
                    for process in [process for process in running if process.poll() is not None]:
                        share, alone = running.pop(process)
                        waiting.extend(self._after(process, share, alone))
                    progress.look()
                    time.sleep(POLL_S)
            finally:
                for process in running:
                    process.terminate()
                for process in running:
                    process.wait()

    def _start(self, share: Sequence[Trial], contest: Contest | None) -> subprocess.Popen[bytes]:
        self._logs.mkdir(parents=True, exist_ok=True)
        rules = None if contest is None else contest.model_dump(mode="json")
        job = json.dumps({"contest": rules, "trials": [trial.model_dump(mode="json") for trial in share]})
        with open(self._logs / "workers.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "train.sweep.workers"], stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        assert process.stdin is not None, "asked for a pipe"
        process.stdin.write(job.encode())
        process.stdin.close()
        return process

    def _after(
        self, process: subprocess.Popen[bytes], share: list[Trial], alone: bool
    ) -> list[tuple[list[Trial], bool]]:
        """What is to be started again after a process has ended."""
        if process.returncode == 2:  # an error that concerns all of them, told by the worker
            lines = (self._logs / "workers.log").read_text(errors="replace").splitlines()
            told = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]  # others are still printing
            raise StorageError(
                "a process of the sweep gave up",
                where=self._logs / "workers.log",
                found=told[-1] if told else "nothing",
            )
        left = [trial for trial in share if not settled(trial.folder)] if process.returncode != 0 else []
        if alone and left:
            how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit status {process.returncode}"
            reason = ", probably for lack of memory" if process.returncode == -9 else ""
            Failure(kind="died", message=f"its process ended with {how}{reason}, twice").save(left[0].folder)
            return []
        return [([trial], True) for trial in left]


def shares(streams: Sequence[Sequence[Trial]], count: int) -> list[list[Trial]]:
    """Streams as they are while each process has one; what is left over is cut so that it, too, fills `count`."""
    whole = len(streams) - len(streams) % count
    found = [list(stream) for stream in streams[:whole]]
    for stream in streams[whole:]:
        pieces = min(-(-count // (len(streams) - whole)), len(stream))
        size = -(-len(stream) // pieces)
        found += [list(stream[start : start + size]) for start in range(0, len(stream), size)]
    return found


def main() -> None:
    """A worker: trains the trials that standard input names."""
    from cache_tools.memory import keep_freed_memory

    keep_freed_memory()
    job = json.load(sys.stdin)
    trials = [Trial.model_validate(trial) for trial in job["trials"]]
    contest = None if job["contest"] is None else Contest.model_validate(job["contest"])
    try:
        train_stream(trials, contest=contest, images_of=opener())
    except CacheError as error:
        print(f"{ERROR}{error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
