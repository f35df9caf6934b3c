"""Trials packed onto pretended GPUs by measured memory: real processes on the CPU, with invented bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cache_tools.errors import DeviceError, NotFoundError
from cache_tools.system import memory
from tests.support import tiny_run
from train.run import train_student
from train.runs.outcome import load_failure
from train.runs.result import load_result
from train.sweep import cli, packed
from train.sweep.packed import PackedEngine, measure_budgets
from train.sweep.packing import memory_key
from train.sweep.recipe import SweepRecipe, Trial, make_trials
from train.sweep.run import MEMORY, run_sweep

# Every process holds 20 bytes of the pretended GPU that it sees. The GPU has as many as `free` says. The first
# processes wait for each other, as many as `together` says, after those that `before` lets go first.
STUDENT = """
import atexit, os, time
from pathlib import Path
import torch
from torch import nn
from cache_tools.system import memory

HERE = Path(__file__).parent
GPU = os.environ.get("CUDA_VISIBLE_DEVICES")  # none in the process that starts the others
if GPU:
    memory.peak_memory = lambda device: 20

def number(name):
    return int((HERE / name).read_text())

class Student(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        body = nn.Conv2d(3, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.net = nn.Sequential(*body, nn.Linear(4, num_classes))

    def forward(self, images):
        if 20 * len(list(HERE.glob("held-*"))) > number("free"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.net(images)

def student(num_classes):
    own = HERE / f"held-{os.getpid()}"
    if GPU and not own.exists():
        own.touch()
        atexit.register(own.unlink)
        with open(HERE / "starts", "a") as starts:
            starts.write(GPU + "\\n")
        count = lambda: len((HERE / "starts").read_text().split())
        end, before = time.monotonic() + 60, number("before")
        while before < count() < before + number("together"):
            assert time.monotonic() < end, "it waits for others that do not start"
            time.sleep(0.01)
    return Student(num_classes)
"""


@pytest.fixture
def trials(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """Three seeds of one student, two epochs each."""
    (tmp_path / "packed_nets.py").write_text(STUDENT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make_trials(sweep(cache), tmp_path / "sweep")


def sweep(cache: Path) -> SweepRecipe:
    base = tiny_run.recipe(cache, Path("unused"), epochs=2, loggers=[]).model_dump(mode="json")
    return SweepRecipe(name="tiny", base=base, students=("packed_nets:student",), seeds=3)


def pretend(folder: Path, *, free: int, before: int, together: int) -> None:
    for name, value in (("free", free), ("before", before), ("together", together)):
        (folder / name).write_text(str(value))


def peaks(folder: Path) -> Any:
    return json.loads((folder / MEMORY).read_text())


@pytest.mark.medium
def test_trials_join_a_measured_one_and_equal_those_of_one_process(
    cache: Path, trials: list[Trial], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(tmp_path, free=40, before=1, together=2)
    run_sweep(sweep(cache), tmp_path / "sweep", engine=PackedEngine({"GPU-a": 50}, tmp_path / "sweep", 8))
    assert (tmp_path / "starts").read_text().split() == ["GPU-a"] * 3
    assert peaks(tmp_path / "sweep") == {"bytes": {memory_key(trials[0].recipe): 20}}
    assert "out of memory" not in capsys.readouterr().err
    alone = train_student(trials[2].recipe.model_copy(update={"out": tmp_path / "alone"}))
    tiny_run.same_runs(trials[2].folder, alone.folder)


@pytest.mark.medium
def test_out_of_memory_is_tried_again_alone_with_one_line(
    trials: list[Trial], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of an earlier command are too small: two trials start together, and the memory is for one."""
    pretend(tmp_path, free=25, before=0, together=2)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / MEMORY).write_text(json.dumps({"bytes": {memory_key(trials[0].recipe): 10}}))
    PackedEngine({"GPU-a": 25}, tmp_path / "sweep", 8)([trials[:2]], None)
    assert all(load_result(trial.folder) is not None for trial in trials[:2])
    lines = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    starts = (tmp_path / "starts").read_text().split()
    assert 1 <= len(lines) == len(starts) - 2 <= 2
    for line in lines:
        name = next(trial.name for trial in trials if trial.name in line)
        assert line == f"warning: {name} ran out of memory beside others on GPU GPU-a: it is tried again alone"
    assert peaks(tmp_path / "sweep")["bytes"] == {memory_key(trials[0].recipe): 20}


@pytest.mark.slow
def test_out_of_memory_alone_is_a_failure(trials: list[Trial], tmp_path: Path) -> None:
    pretend(tmp_path, free=10, before=0, together=0)
    PackedEngine({"GPU-a": 25}, tmp_path / "sweep", 8)([trials[:1]], None)
    failure = load_failure(trials[0].folder)
    assert failure is not None
    assert (failure.kind, "not enough memory" in failure.message) == ("memory", True)
    assert len((tmp_path / "starts").read_text().split()) == 1, "there is no other way to try it"


@pytest.mark.slow
def test_a_process_that_dies_twice_is_a_failure(
    trials: list[Trial], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = STUDENT.replace("return Student", "os.kill(os.getpid(), 9); return Student")
    (tmp_path / "packed_nets.py").write_text(code)
    pretend(tmp_path, free=99, before=0, together=0)
    PackedEngine({"GPU-a": 25}, tmp_path / "sweep", 8)([trials[:1]], None)
    failure = load_failure(trials[0].folder)
    assert failure is not None
    assert failure.message == "its process ended with signal 9, probably for lack of memory, twice"
    assert f"warning: the process of {trials[0].name} has died: it is tried again alone\n" in capsys.readouterr().err


@pytest.mark.slow
def test_an_error_of_all_trials_is_raised(trials: list[Trial], tmp_path: Path) -> None:
    recipe = trials[0].recipe.model_copy(update={"cache": "nosuch.zarr"})
    with pytest.raises(NotFoundError, match="nosuch"):
        PackedEngine({"GPU-a": 25}, tmp_path, 8)([[trials[0].model_copy(update={"recipe": recipe})]], None)


# Memory


def test_the_memory_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 << 20)
    assert memory.peak_memory(torch.device("cuda")) == (3 << 20) + memory.CONTEXT_BYTES
    assert memory.peak_memory(torch.device("cpu")) == 0


def test_budgets_are_most_of_what_is_free(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(packed, "free_memory", lambda device: (device.index + 1) * 1000)
    packed.main()
    printed = capsys.readouterr().out
    assert json.loads(printed) == [1000, 2000]
    monkeypatch.setattr(packed, "command_for", lambda module: ["echo", printed])
    assert measure_budgets(["GPU-a", "GPU-b"]) == {"GPU-a": 900, "GPU-b": 1800}
    with pytest.raises(DeviceError, match=r"cannot ask.*=GPU-a.*expected 1 GPU.*found 2"):
        measure_budgets(["GPU-a"])
    monkeypatch.setattr(packed, "command_for", lambda module: ["sh", "-c", "echo no driver >&2; exit 1"])
    with pytest.raises(DeviceError, match="found no driver"):
        measure_budgets(["GPU-a"])


def test_damaged_figures_are_measured_again(tmp_path: Path) -> None:
    for text in ("{", '{"bytes": {"a": -1}}', '{"bytes": 3}'):
        (tmp_path / MEMORY).write_text(text)
        assert PackedEngine({}, tmp_path, 1)._peaks() == {}


# The command line


class _Chosen(Exception):
    """The engine that the command has chosen."""


def chosen(monkeypatch: pytest.MonkeyPatch, gpus: list[str], *words: str) -> Any:
    """(engine, its arguments) of a command on a machine with these GPUs, or the line of its error."""

    def engine(name: str) -> Any:
        def make(*arguments: Any) -> Any:
            raise _Chosen(name, *arguments)

        return make

    monkeypatch.setattr("cache_tools.console.resolve_device", lambda name: torch.device("cuda" if gpus else "cpu"))
    monkeypatch.setattr("train.sweep.workers.visible_gpus", lambda device, name: gpus if ":" not in name else [])
    monkeypatch.setattr("train.sweep.workers.ProcessEngine", engine("processes"))
    monkeypatch.setattr("train.sweep.packed.PackedEngine", engine("packed"))
    monkeypatch.setattr("train.sweep.packed.measure_budgets", lambda gpus: dict.fromkeys(gpus, 900))
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    result = CliRunner().invoke(cli.app, ["digits", "--out", "folder", *words])
    if isinstance(result.exception, _Chosen):
        return result.exception.args
    assert result.exit_code == 2, result.output
    assert result.output.count("\n") == 1
    return result.output


def test_per_gpu_chooses_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, gpus, budgets = Path("folder"), ["0", "1"], {"0": 900, "1": 900}
    assert chosen(monkeypatch, gpus) == ("processes", 2, folder, gpus)
    assert chosen(monkeypatch, gpus, "--per-gpu", "3") == ("processes", 6, folder, gpus)
    assert chosen(monkeypatch, gpus, "--per-gpu", "auto") == ("packed", budgets, folder, 16)
    assert chosen(monkeypatch, gpus, "--per-gpu", "auto", "--workers", "5") == ("packed", budgets, folder, 5)
    assert chosen(monkeypatch, ["0"], "--per-gpu", "auto") == ("packed", {"0": 900}, folder, 16)


@pytest.mark.parametrize(
    ("gpus", "words", "message"),
    [
        ([], ["--per-gpu", "auto"], "found no GPU, so the device is cpu"),
        ([], ["--per-gpu", "2"], "found no GPU, so the device is cpu"),
        (["0"], ["--per-gpu", "auto", "--device", "cuda:1"], "found --device cuda:1"),
        (["0"], ["--per-gpu", "0"], "expected auto, or 1 to 64"),
        (["0"], ["--per-gpu", "many"], "expected auto, or 1 to 64"),
        (["0"], ["--per-gpu", "1" * 5000], "expected auto, or 1 to 64"),
        (["0"], ["--per-gpu", "2", "--workers", "3"], "both options set the number of processes"),
        (["0"], ["--per-gpu", "auto", "--engine", "ray"], "Use --ray-gpus"),
    ],
)
def test_per_gpu_is_refused_where_it_has_no_effect(
    monkeypatch: pytest.MonkeyPatch, gpus: list[str], words: list[str], message: str
) -> None:
    assert message in chosen(monkeypatch, gpus, *words)
