"""Kill commands that write a cache at random instants, again and again, and see that nothing is lost or made up.

    python tests/system/faults.py --kills 200 --of build grow push push-s3

Every case starts a command in a process of its own and ends it with SIGKILL: half of them at a random time, half of
them just before or after a random call that changes the disk or the store. Then another process looks at what is
there: rows that a reader saw as committed are still there, every row that can be read is that of an undisturbed run,
what is not committed cannot be read, and `verify` finds nothing. After one to three kills the command runs to its end,
and the result must equal the undisturbed one. One JSON line per kill and per finished chain, then one with the sums;
exit code 1 if anything is wrong.

Processes are forked from this one, which has imported everything and opened nothing, so that a case takes moments.
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
    """When a process is to die: after a time, or at the n-th call that changes something, before or after it."""

    after_s: float | None = None
    call: int | None = None
    done: bool = False

    def __str__(self) -> str:
        if self.after_s is not None:
            return f"{self.after_s:.4f} s"
        return f"{'after' if self.done else 'before'} call {self.call}"


def kill_again_and_again(case: Case, kills: int, chance: random.Random) -> Iterator[dict[str, Any]]:
    """Lines about `kills` kills of a case, and about each finished chain of them."""
    elapsed_s, calls = _clean(case)
    done = number = 0
    while done < kills:
        target, seen = in_child(lambda number=number: case.new_target(number)), []
        number += 1
        for _ in range(min(chance.randint(1, MAX_CHAIN), kills - done)):
            instant = _instant(chance, elapsed_s, calls)
            killed, noticed = _run_and_kill(case, target, instant)
            if not killed:
                break
            done += 1
            seen = sorted({*map(tuple, seen), *map(tuple, noticed)})
            found = Found(**in_child(lambda target=target, seen=seen: case.look(target, seen)))
            yield {"of": case.name, "kill": done, "at": str(instant), **vars(found)}
        _run(case, target)
        found = Found(**in_child(lambda target=target: case.look(target, [], finished=True)))
        yield {"of": case.name, "finished": True, **vars(found)}
        in_child(lambda target=target: case.remove(target))


def summary(lines: list[dict[str, Any]], elapsed_s: float) -> dict[str, Any]:
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


def _clean(case: Case) -> tuple[float, int]:
    """Time and calls of an undisturbed run, which is what others are compared with."""
    target = in_child(lambda: case.new_target(None))
    start = time.monotonic()
    _run(case, target)
    elapsed_s = time.monotonic() - start
    in_child(lambda: case.keep_clean(target))
    target = in_child(lambda: case.new_target(-1))
    calls = in_child(lambda: _counted(lambda: case.run(target)), case.log)
    in_child(lambda: case.remove(target))
    return elapsed_s, calls


def _run(case: Case, target: str) -> None:
    answer = Child(lambda: case.run(target), case.log).wait()
    if answer != {"result": None}:
        raise RuntimeError(f"{case.name}: {answer}\n{case.log.read_text()}")


def _instant(chance: random.Random, elapsed_s: float, calls: int) -> Instant:
    if chance.random() < 0.5:
        return Instant(after_s=chance.uniform(0.0, elapsed_s))
    return Instant(call=chance.randint(1, calls), done=chance.random() < 0.5)


def _run_and_kill(case: Case, target: str, instant: Instant) -> tuple[bool, list[tuple[int, int]]]:
    """Whether the process died as it should, and what a reader beside it saw as committed."""
    with _watching(case, target) as seen:
        if instant.after_s is None:
            answer = Child(lambda: _dying(instant, lambda: case.run(target)), case.log).wait()
            killed = answer is None
        else:
            child = Child(lambda: case.run(target), case.log)
            time.sleep(instant.after_s)
            killed = child.kill()
    return killed, seen


@contextmanager
def _watching(case: Case, target: str) -> Iterator[list[tuple[int, int]]]:
    """A reader that looks at the target all the time; what it saw is in the list when this is left."""
    seen: list[tuple[int, int]] = []
    stop, say = os.pipe()
    child = Child(lambda: case.watch(target, stop))
    try:
        yield seen
    finally:
        os.write(say, b"stop")
        answer = child.wait()
        os.close(stop)
        os.close(say)
        if answer is None or "result" not in answer:
            raise RuntimeError(f"{case.name}: the reader failed: {answer}")
        seen += [(view, block) for view, block in answer["result"]]


def _counted(run: Callable[[], None]) -> int:
    count = 0

    def called(done: bool) -> None:
        nonlocal count
        count += not done

    _trap(called)
    run()
    return count


def _dying(instant: Instant, run: Callable[[], None]) -> None:
    count = 0

    def called(done: bool) -> None:
        nonlocal count
        count += not done
        if count == instant.call and done == instant.done:
            os.kill(os.getpid(), signal.SIGKILL)

    _trap(called)
    run()


def _trap(called: Callable[[bool], None]) -> None:
    """Have every call that changes a disk or an object store say so before and after it."""
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
    fault_cases.import_everything()
    lines, start = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.of:
            with fault_cases.prepared(name, Path(folder), in_child) as case:
                for line in kill_again_and_again(case, options.kills, random.Random(f"{options.seed} {name}")):
                    lines.append(line)
                    print(json.dumps(line), flush=True)
    total = summary(lines, time.monotonic() - start)
    print(json.dumps(total), flush=True)
    sys.exit(1 if total["problems"] else 0)


if __name__ == "__main__":
    main()
