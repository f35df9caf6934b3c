"""Kill commands at every step in which they change the disk, and run them again.

    python tests/system/adversary/kills.py --of build train --kills 20

Each command runs in a forked process. At a step (`tests.support.disk_steps`) it is ended with SIGKILL; steps that leave
the same files as the one before are left out. Then other
commands must read what it left, without a traceback. Then the same command runs again, and everything below the folder
must equal what an undisturbed run makes, except for times. Before every second of these runs, the files that the killed
process left are made two hours older: no partial file may then be left. Prints a JSON line for each command, and a
summary; exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))

from cache_tools.config import Frozen
from tests.support import fault_cases
from tests.support.child import Child, in_child
from tests.support.disk_steps import DiskSteps
from tests.support.kill_cases import CASES, KillCase, contents, differences, run, split_leftovers
from tests.support.s3_server import environment, s3_server_elsewhere

OLD_S = 7200.0


class Kills:
    """One command in a folder of its own."""

    def __init__(self, case: KillCase, root: Path) -> None:
        self.case, self.work, self._start, self._log = case, root / "work", root / "start", root / "log.txt"
        self.work.mkdir(parents=True)
        self._in_child(case.prepare)
        shutil.copytree(self.work, self._start, symlinks=True)
        self._warm_up()
        self.steps, self.states, self._expected = self._undisturbed()
        *_, expected = self._undisturbed()
        if problems := differences(expected, self._expected):
            raise RuntimeError(f"{case.name}: two undisturbed runs differ: {problems}")

    def at(self, step: int, *, aged: bool) -> tuple[bool, list[str]]:
        """Kill the command at a step: whether it came to that step, and what is wrong afterwards."""
        self._reset()
        answer = Child(lambda: self._inside(lambda: self._counted(step)), self._log).wait()
        if answer is not None:
            return False, [] if "result" in answer else [f"not killed: {answer}\n{self._log.read_text()}"]
        problems, contents = self._in_child(lambda: self._go_on(aged))
        found, left = split_leftovers(contents)
        if aged:
            problems += [f"left behind: {name}" for name in left]
        return True, problems + differences(found, self._expected)

    def _go_on(self, aged: bool) -> tuple[list[str], dict[str, str]]:
        """Run the other commands, then the command again: what is wrong with how they end, and what there is then."""
        if aged:
            _make_older(self.work)
        problems = []
        for command in (*self.case.others, self.case.again or self.case.command):
            outcome = run(command)
            if outcome["code"] not in command.codes:
                name = " ".join([command.program, *command.arguments])
                text = outcome.get("traceback") or self._log.read_text()[-600:]
                problems.append(f"{name}: exit code {outcome['code']}: {text}")
        return problems, contents(self.work, self.case.ignored)

    def _warm_up(self) -> None:
        """Import what the command imports, in this process: children are forked from it, and then start at once."""
        for name in self._in_child(lambda: (self._counted(None), sorted(sys.modules))[1]):
            with suppress(Exception):  # modules that another program was to import
                importlib.import_module(name)
        for kind in _models(Frozen):
            kind.model_rebuild()
        assert threading.active_count() == 1, "forking is not safe"
        gc.collect()
        gc.freeze()  # children copy fewer pages

    def distinct(self) -> list[int]:
        """The numbers of the steps without those that leave the same files as the one before."""
        return [
            number
            for number, state in enumerate(self.states, start=1)
            if number == 1 or state != self.states[number - 2]
        ]

    def _undisturbed(self) -> tuple[list[str], list[str], dict[str, str]]:
        """The steps of an undisturbed run, the states at each, and what it makes."""
        self._reset()
        steps, states = self._in_child(lambda: self._counted(None))
        found, left = split_leftovers(self._contents())
        if left:
            raise RuntimeError(f"{self.case.name}: an undisturbed run leaves {left}")
        return steps, states, found

    def _counted(self, step: int | None) -> tuple[list[str], list[str]]:
        """Run the command, up to a step; gives all steps and states."""
        disk = DiskSteps(self.work, step)
        disk.install()
        outcome = run(self.case.command)
        if outcome["code"] != 0:
            raise RuntimeError(outcome.get("traceback") or f"exit code {outcome['code']}")
        disk.finish()
        return disk.steps, disk.states

    def _contents(self) -> dict[str, str]:
        return self._in_child(lambda: contents(self.work, self.case.ignored))

    def _in_child(self, function: Any) -> Any:
        return in_child(lambda: self._inside(function), self._log)

    def _inside(self, function: Any) -> Any:
        (self.work / "home").mkdir(exist_ok=True)
        os.chdir(self.work)
        os.environ["TEACHER_CACHE_HOME"] = str(self.work / "home")
        return function()

    def _reset(self) -> None:
        shutil.rmtree(self.work)
        shutil.copytree(self._start, self.work, symlinks=True)


def kill_all(case: KillCase, root: Path, kills: int | None) -> dict[str, Any]:
    """Kill a command at every step that leaves other files than the one before, or at some; gives the line to print.

    Args:
        kills: the number of steps, spread over the command; None for all.
    """
    start = time.monotonic()
    killed = Kills(case, root)
    steps = killed.distinct()
    chosen = steps if kills is None else [steps[(2 * n + 1) * len(steps) // (2 * kills)] for n in range(kills)]
    problems: dict[str, list[str]] = {}
    done = 0
    for count, number in enumerate(chosen):
        was_killed, found = killed.at(number, aged=count % 2 == 1)
        done += was_killed
        if found:
            problems[f"{number}: {killed.steps[number - 1]}"] = found
    elapsed_s = round(time.monotonic() - start, 1)
    counts = {"steps": len(killed.steps), "states": len(steps), "kills": done}
    return {"of": case.name, **counts, "problems": problems, "elapsed_s": elapsed_s}


def _models(kind: type[Frozen]) -> Iterator[type[Frozen]]:
    for each in kind.__subclasses__():
        yield each
        yield from _models(each)


def _make_older(root: Path) -> None:
    then = time.time() - OLD_S
    for folder, folders, files in os.walk(root, topdown=False):
        for name in (*folders, *files):
            os.utime(Path(folder, name), (then, then), follow_symlinks=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--of", nargs="+", default=names, choices=names, metavar="COMMAND", help=", ".join(names))
    parser.add_argument(
        "--kills", type=int, help="number of kills of each command, spread over its steps; default: all"
    )
    parser.add_argument("--list", action="store_true", help="print the steps of each command, and kill nothing")
    options = parser.parse_args()
    programs = {case.command.program for case in CASES if case.name in options.of}
    fault_cases.import_modules(
        builds="build-cache" in programs, students=programs - {"build-cache", "cache-tools"} != set()
    )
    lines, start = [], time.monotonic()
    memory = Path("/dev/shm")  # where flushing takes no time
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None))
        if any(case.needs_store for case in CASES if case.name in options.of):
            stack.enter_context(environment(stack.enter_context(s3_server_elsewhere())))
        for case in CASES:
            if case.name not in options.of:
                continue
            root = Path(folder, case.name)
            if options.list:
                for number, step in enumerate(Kills(case, root).steps, start=1):
                    print(f"{case.name} {number}: {step}")
                continue
            lines.append(kill_all(case, root, options.kills))
            print(json.dumps(lines[-1]), flush=True)
            shutil.rmtree(root)
    total = {key: sum(line[key] for line in lines) for key in ("steps", "states", "kills")}
    count = sum(len(line["problems"]) for line in lines)
    print(json.dumps({**total, "problems": count, "elapsed_s": round(time.monotonic() - start, 1)}), flush=True)
    sys.exit(1 if count else 0)


if __name__ == "__main__":
    main()
