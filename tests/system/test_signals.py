"""SIGTERM ends every long command as Ctrl-C does: what is done is kept, the same command resumes, no process stays."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cache_tools import console
from cache_tools.config import dump_yaml
from cache_tools.console import command
from cache_tools.places import transfer
from cache_tools.reader import TeacherCache
from cache_tools.system import processes as processes_module
from pipeline.build.cache import build_cache
from tests.support import tiny_build, tiny_run
from tests.support.child import Child
from tests.support.preloaded import Preloaded, run_main
from tests.support.turns import turns
from train.run import train_student

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
ROOT = Path(__file__).parents[2]
MODULES = {
    "build-cache": "pipeline.cli",
    "train-student": "train.cli",
    "sweep-students": "train.sweep.cli",
    "cache-tools": "cache_tools.cli",
}
PATIENCE_S, END_S = 200.0, 20.0
SLOW_SIGNALS = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT)]


@contextmanager
def started(command: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command in a new interpreter."""
    words = [sys.executable, "-c", f"from {MODULES[command]} import main; main()", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def forked(command: str, *arguments: object, before: Callable[[], None] | None = None) -> Iterator[Preloaded]:
    """A command in a process that has imported it (`preloaded`); `before` runs first."""
    process = Preloaded(prepare_and_run, before, MODULES[command], *map(str, arguments))
    try:
        yield process
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.communicate(PATIENCE_S)


def prepare_and_run(before: Callable[[], None] | None, module: str, *arguments: str) -> None:
    if before is not None:
        before()
    run_main(module, *arguments)


def stop_once(there: Callable[[], object], process: subprocess.Popen[str] | Preloaded, *signals: int) -> str:
    """Send signals to a command as soon as something is there; returns its last line."""
    wait_for(there)
    for number in signals:
        process.send_signal(number)
    _, printed = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signals[0], printed
    return printed.splitlines()[-1]


def wait_for(there: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + patience_s
    while not there():
        assert time.monotonic() < end, "it did not get that far"
        time.sleep(0.01)


def wait_for_change(file: Path) -> None:
    def changed_ns() -> int:
        return file.stat().st_mtime_ns if file.exists() else 0

    before_ns = changed_ns()
    wait_for(lambda: changed_ns() != before_ns)


def run(command: str, *arguments: object) -> None:
    with forked(command, *arguments) as process:
        _, printed = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, printed


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_build.prepare(tmp_path_factory.mktemp("files"), train=48)
    tiny_run.write_cache(root / "tiny.zarr", root / "pictures")
    return root


@pytest.mark.slow
def test_a_build_keeps_its_blocks(files: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "build.yaml"
    recipe.write_text(dump_yaml(tiny_build.recipe(files, num_views=3000, out=tmp_path / "cache.zarr")))
    with started("build-cache", recipe) as build:
        last = stop_once(lambda: len(list(tmp_path.glob("cache.zarr/commits/c.*"))) > 3, build, signal.SIGTERM)
    assert last == "Stopped by SIGTERM. Run the same command again to resume."
    built = TeacherCache.open(tmp_path / "cache.zarr").committed_blocks().sum()
    assert 3 < built < 3000
    assert not list(tmp_path.glob(".cache.zarr.claims/*")), "other builders need not wait for its claims"


@pytest.mark.medium
@pytest.mark.turns
def test_a_build_ends_when_it_is_told_and_the_same_command_completes_it(files: Path, tmp_path: Path) -> None:
    """At random instants: the exit code, the time until the end, and the arrays of an undisturbed build afterwards."""
    count = turns(1, 12)
    recipe = tiny_build.recipe(files, num_views=100 * count, out=tmp_path / "cache.zarr")
    (tmp_path / "build.yaml").write_text(dump_yaml(recipe))
    rng, commits, took_s = random.Random(0), tmp_path / "cache.zarr/commits", []
    for number in range(count):
        chosen, before = (signal.SIGTERM, signal.SIGUSR1)[number % 2], len(list(commits.glob("c.*")))
        with forked("build-cache", tmp_path / "build.yaml") as build:
            wait_for(lambda before=before: len(list(commits.glob("c.*"))) > before)
            time.sleep(rng.random() * 0.3)
            told_s = time.monotonic()
            build.send_signal(chosen)
            _, printed = build.communicate(timeout=PATIENCE_S)
            took_s.append(round(time.monotonic() - told_s, 2))
            assert build.returncode == 128 + chosen, printed
        assert not list(tmp_path.glob(".cache.zarr.claims/*")), "other builders need not wait for its claims"
    print("seconds until the end:", took_s)
    assert max(took_s) < 3 * END_S, "generous: other processes may take all cores"
    assert len(list(commits.glob("c.*"))) < recipe.num_views, "each of them was told before its end"
    run("build-cache", tmp_path / "build.yaml")
    build_cache(recipe.model_copy(update={"out": tmp_path / "whole.zarr"}))
    assert tiny_build.arrays_of(tmp_path / "cache.zarr") == tiny_build.arrays_of(tmp_path / "whole.zarr")


@pytest.mark.slow
def test_a_run_resumes_and_ends_as_one_that_was_not_stopped(files: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(files / "tiny.zarr", tmp_path / "run", epochs=40, evaluate_every=40, loggers=())
    (tmp_path / "run.yaml").write_text(dump_yaml(recipe))
    with started("train-student", tmp_path / "run.yaml") as training:
        stop_once((tmp_path / "run/state.pt").exists, training, signal.SIGTERM, signal.SIGTERM)
    assert not (tmp_path / "run/result.json").exists()
    run("train-student", tmp_path / "run.yaml")
    train_student(recipe.model_copy(update={"out": tmp_path / "whole"}))
    one, other = (load_file(tmp_path / name / "last.safetensors") for name in ("run", "whole"))
    assert all(one[name].equal(other[name]) for name in other)


@pytest.mark.medium
@pytest.mark.turns
def test_a_run_stores_a_checkpoint_when_it_is_told_to_end(files: Path, tmp_path: Path) -> None:
    """At random instants of one long epoch: the exit code, the time until the end, and the same result afterwards."""
    count = turns(1, 10)
    recipe = tiny_run.recipe(files / "tiny.zarr", tmp_path / "run", epochs=8 * count, batch_size=2, loggers=())
    recipe = recipe.model_copy(update={"evaluate_every": recipe.epochs})
    (tmp_path / "run.yaml").write_text(dump_yaml(recipe))
    rng, state = random.Random(0), tmp_path / "run/state.pt"
    for number in range(count):
        chosen = (signal.SIGUSR1, signal.SIGTERM)[number % 2]
        with forked("train-student", tmp_path / "run.yaml") as training:
            wait_for_change(state)
            time.sleep(rng.random() * 0.3)
            told_s = time.monotonic()
            training.send_signal(chosen)
            _, printed = training.communicate(timeout=PATIENCE_S)
            assert training.returncode == 128 + chosen, printed
            assert time.monotonic() - told_s < END_S
        assert printed.splitlines()[-1] == f"Stopped by {chosen.name}. Run the same command again to resume."
        assert {path.name for path in (tmp_path / "run").iterdir()} & {"checkpoint.pt", "state.pt"}
    run("train-student", tmp_path / "run.yaml")
    train_student(recipe.model_copy(update={"out": tmp_path / "whole"}))
    tiny_run.same_runs(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.medium), *SLOW_SIGNALS])
def test_the_processes_of_a_sweep_end_with_it(files: Path, tmp_path: Path, number: signal.Signals) -> None:
    recipe = tiny_run.recipe(files / "tiny.zarr", tmp_path, epochs=2000, evaluate_every=2000, loggers=())
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json", exclude={"out"})))
    options = [tmp_path / "recipe.yaml", "--students", "resnet8,resnet14", "--workers", 2, "--out", tmp_path / "sweep"]
    with forked("sweep-students", *options) as sweep:
        wait_for(lambda: len(list(tmp_path.glob("sweep/trials/*/state.pt"))) == 2)
        workers = [pid for pid in processes() if parent(pid) == sweep.pid]
        assert len(workers) == 2
        if number == signal.SIGKILL:
            sweep.send_signal(number)
            sweep.communicate(END_S)
            wait_for(lambda: not set(workers) & set(processes()), END_S)
        else:
            stop_once(lambda: True, sweep, number)
    assert not set(workers) & set(processes())


def test_a_process_ends_if_its_parent_ended_before_it_looked(tmp_path: Path) -> None:
    """It is started for a parent that is not its own, as if that had ended while the interpreter started."""
    code = processes_module.code_for("cache_tools.cli").replace(f"parent={os.getpid()}", "parent=1")
    code = code.replace(
        "run('cache_tools.cli', ",
        "import time, cache_tools.cli as cli; cli.main = lambda: time.sleep(60); run('cache_tools.cli', ",
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    assert child.wait(END_S) == -signal.SIGTERM


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    def run() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        processes_module.end_with_parent(1, grace_s=0.2)
        time.sleep(60)

    assert Child(run).wait() is None, "it was killed"


@pytest.mark.medium
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_pool_ends_with_the_process_that_uses_it(tmp_path: Path, number: signal.Signals) -> None:
    """Its workers are at work on something long, or wait for work."""
    code = (
        "import os, time, pathlib\n"
        "from cache_tools.system.processes import process_pool\n"
        "pool = process_pool(2)\n"
        "pids = {pool.submit(os.getpid).result() for _ in range(1)}\n"
        "busy = pool.submit(time.sleep, 60)\n"
        "time.sleep(1)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    user = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        wait_for((tmp_path / "ready").exists)
        children = [pid for pid in processes() if parent(pid) == user.pid]
        assert len(children) >= 2
        user.send_signal(number)
        user.wait(END_S)
        wait_for(lambda: not set(children) & set(processes()), END_S)
    finally:
        user.kill()
        user.wait()


def copy_slowly() -> None:
    copy = transfer.copy_block

    def slow_copy(*arguments: Any) -> Any:
        time.sleep(0.2)
        return copy(*arguments)

    transfer.WORKERS = 1
    transfer.copy_block = slow_copy  # type: ignore[assignment]


@pytest.mark.medium
def test_a_copy_continues(files: Path, tmp_path: Path) -> None:
    words = ["push", files / "tiny.zarr", tmp_path / "copy.zarr"]
    copied = tmp_path / "copy.zarr/commits"
    with forked("cache-tools", *words, before=copy_slowly) as push:
        stop_once(lambda: list(copied.glob("c.*")), push, signal.SIGTERM)
    assert 0 < len(list(copied.glob("c.*"))) < len(list((files / "tiny.zarr/commits").glob("c.*")))
    run("cache-tools", *words)
    assert TeacherCache.open(tmp_path / "copy.zarr").is_complete


# The exit code, in small commands


def small(main: Callable[[], None], log: Path, handlers: dict[int, Any] | None = None) -> Child:
    """A command in a forked process, which has the handlers of a new one, and others if given."""

    def run() -> None:
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not those of pytest
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, handler in {
            signal.SIGTERM: signal.SIG_DFL,
            signal.SIGHUP: signal.SIG_DFL,
            **(handlers or {}),
        }.items():
            signal.signal(number, handler)
        command(main)()

    return Child(run, log)


def stop(child: Child, there: Path, *signals: int) -> int:
    """The exit code of a small command after these signals."""
    wait_for(there.exists)
    for number in signals:
        os.kill(child.pid, number)
    answer = child.wait()
    assert answer is not None, "it was killed"
    code: int = answer["exit"]
    return code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_exit_code_is_that_of_the_signal(tmp_path: Path, number: signal.Signals) -> None:
    def wait() -> None:
        (tmp_path / "started").touch()
        time.sleep(60)

    assert stop(small(wait, tmp_path / "log"), tmp_path / "started", number) == 128 + number
    name = "Interrupted" if number == signal.SIGINT else f"Stopped by {number.name}"
    assert (tmp_path / "log").read_text() == f"{name}. Run the same command again to resume.\n"


def test_cleaning_up_is_not_interrupted_by_the_same_signal(tmp_path: Path) -> None:
    def clean_up_slowly() -> None:
        try:
            (tmp_path / "started").touch()
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            (tmp_path / "cleaned").touch()

    assert stop(small(clean_up_slowly, tmp_path / "log"), tmp_path / "started", signal.SIGTERM) == 143
    assert (tmp_path / "cleaned").exists()


def test_a_later_signal_ends_a_clean_up_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "REPEATED_S", 0.0)

    def hang() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            (tmp_path / "cleaning").touch()
            time.sleep(60)

    assert stop(small(hang, tmp_path / "log"), tmp_path / "cleaning", signal.SIGTERM) == 143


def test_ignored_signals_stay_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    work = small(lambda: os.kill(os.getpid(), signal.SIGHUP), tmp_path / "log", {signal.SIGHUP: signal.SIG_IGN})
    assert work.wait() == {"result": None}


def test_signals_are_as_before_after_a_command() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        command(lambda: None)()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def processes() -> list[int]:
    """Processes that are running."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and parent(int(path.name)) > 0]


def parent(pid: int) -> int:
    """The parent of a running process; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[1])
