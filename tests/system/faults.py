"""Kill commands that write a cache at random instants, and check what they leave and how they resume.

    python tests/system/faults.py --kills 200 --of build grow push push-s3

Each command runs in a process of its own and is ended with SIGKILL: half of the time at a random moment, otherwise just
before or after a random call that changes the disk or the store. Then another process checks the target: blocks that a
reader saw as committed are still committed, every readable row equals that of an undisturbed run, uncommitted rows
cannot be read, and `verify` finds no problem. After one to three kills the command runs to its end, and the result
must equal that of the undisturbed run. Prints one JSON line per kill and per finished chain, then a summary; exits
with 1 if anything is wrong.

All processes are forked from this one. It has imported what they need, so they start at once; it opens no files and
starts no threads, so forking is safe.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support import fault_cases
from tests.support.child import Child, in_child
from tests.support.fault_cases import Case, Found

MAX_CHAIN = 3
CALLS = ("fsync", "replace", "rename", "link", "unlink", "mkdir")


@dataclass(frozen=True)
class Instant:
    """When to kill a process: after a time, or before or after (`done`) the n-th call that changes something."""

    after_s: float | None = None
    call: int | None = None
    done: bool = False

    def __str__(self) -> str:
        if self.after_s is not None:
            return f"{self.after_s:.4f} s"
        return f"{'after' if self.done else 'before'} call {self.call}"


def kill_repeatedly(case: Case, kills: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Kill a case `kills` times, in chains that end with a whole run; yields the lines to print."""
    elapsed_s, calls = _run_undisturbed(case)
    done = number = 0
    while done < kills:
        target = in_child(lambda number=number: case.new_target(number))
        seen: list[Any] = []
        number += 1
        for _ in range(min(rng.randint(1, MAX_CHAIN), kills - done)):
            instant = _draw_instant(rng, elapsed_s, calls)
            killed, newly_seen = _run_and_kill(case, target, instant)
            if not killed:
                break
            done += 1
            seen = sorted({*map(tuple, seen), *map(tuple, newly_seen)})
            found = Found(**in_child(lambda target=target, seen=seen: case.look(target, seen)))
            yield {"of": case.name, "kill": done, "at": str(instant), **vars(found)}
        _run(case, target)
        found = Found(**in_child(lambda target=target: case.look(target, [], finished=True)))
        yield {"of": case.name, "finished": True, **vars(found)}
        in_child(lambda target=target: case.remove(target))


def summarise(lines: list[dict[str, Any]], elapsed_s: float) -> dict[str, Any]:
    kills = [line for line in lines if "kill" in line]
    return {
        "kills": len(kills),
        "of": {name: sum(line["of"] == name for line in kills) for name in dict.fromkeys(line["of"] for line in kills)},
        "half_way": sum(0 < line["committed"] < line["blocks"] for line in kills),
        "finished": sum("finished" in line for line in lines),
        "rows_compared": sum(line["rows"] for line in lines),
        "refused": sum(line["refused"] for line in lines),
        "problems": sum(len(line["problems"]) for line in lines),
        "elapsed_s": round(elapsed_s, 1),
    }


def _run_undisturbed(case: Case) -> tuple[float, int]:
    """Make the cache that others are compared with; gives the time of the run, and its number of calls."""
    target = in_child(lambda: case.new_target(None))
    start = time.monotonic()
    _run(case, target)
    elapsed_s = time.monotonic() - start
    in_child(lambda: case.keep_clean(target))
    target = in_child(lambda: case.new_target(-1))
    calls = in_child(lambda: _count_calls(lambda: case.run(target)), case.log)
    in_child(lambda: case.remove(target))
    return elapsed_s, calls


def _run(case: Case, target: str) -> None:
    answer = Child(lambda: case.run(target), case.log).wait()
    if answer != {"result": None}:
        raise RuntimeError(f"{case.name}: {answer}\n{case.log.read_text()}")


def _draw_instant(rng: random.Random, elapsed_s: float, calls: int) -> Instant:
    if rng.random() < 0.5:
        return Instant(after_s=rng.uniform(0.0, elapsed_s))
    return Instant(call=rng.randint(1, calls), done=rng.random() < 0.5)


def _run_and_kill(case: Case, target: str, instant: Instant) -> tuple[bool, list[tuple[int, int]]]:
    """Whether the process was killed before it ended, and the blocks that a reader beside it saw as committed."""
    with _reader(case, target) as seen:
        if instant.after_s is None:
            answer = Child(lambda: _run_until(instant, lambda: case.run(target)), case.log).wait()
            killed = answer is None
        else:
            child = Child(lambda: case.run(target), case.log)
            time.sleep(instant.after_s)
            killed = child.kill()
    return killed, seen


@contextmanager
def _reader(case: Case, target: str) -> Iterator[list[tuple[int, int]]]:
    """Run a reader that polls the target; afterwards the list holds the blocks that it saw as committed."""
    seen: list[tuple[int, int]] = []
    reading, writing = os.pipe()
    child = Child(lambda: case.watch(target, reading))
    try:
        yield seen
    finally:
        os.write(writing, b"stop")
        answer = child.wait()
        os.close(reading)
        os.close(writing)
        if answer is None or "result" not in answer:
            raise RuntimeError(f"{case.name}: the reader failed: {answer}")
        seen += [(view, block) for view, block in answer["result"]]


def _count_calls(run: Callable[[], None]) -> int:
    count = 0

    def called(done: bool) -> None:
        nonlocal count
        count += not done

    _intercept_calls(called)
    run()
    return count


def _run_until(instant: Instant, run: Callable[[], None]) -> None:
    """Run, and kill this process at an instant."""
    count = 0

    def called(done: bool) -> None:
        nonlocal count
        count += not done
        if count == instant.call and done == instant.done:
            os.kill(os.getpid(), signal.SIGKILL)

    _intercept_calls(called)
    run()


def _intercept_calls(called: Callable[[bool], None]) -> None:
    """Call `called(False)` before and `called(True)` after each call that changes the disk or an object store."""
    import obstore

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            called(False)
            result = function(*args, **kwargs)
            called(True)
            return result

        return wrapper

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
    for name in ("put", "delete"):
        setattr(obstore, name, wrapped(getattr(obstore, name)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills of each command")
    parser.add_argument("--of", nargs="+", default=list(fault_cases.CASES), choices=list(fault_cases.CASES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    fault_cases.import_for(options.of)
    lines, start = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.of:
            with fault_cases.prepared(name, Path(folder), in_child) as case:
                for line in kill_repeatedly(case, options.kills, random.Random(f"{options.seed} {name}")):
                    lines.append(line)
                    print(json.dumps(line), flush=True)
    total = summarise(lines, time.monotonic() - start)
    print(json.dumps(total), flush=True)
    sys.exit(1 if total["problems"] else 0)


if __name__ == "__main__":
    main()
