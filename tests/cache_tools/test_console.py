"""cache_tools.console: names of devices, progress, warnings of other libraries, --version."""

from __future__ import annotations

import logging
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from cache_tools.console import Progress, command, cpu_model, describe_device, device_name, resolve_device, warn
from cache_tools.errors import DeviceError
from cache_tools.units import counted

CPU = torch.device("cpu")


def test_the_cpu_has_a_name_and_a_description() -> None:
    assert device_name(CPU) == "cpu"  # stored in caches, and compared by a replay
    assert describe_device(CPU) == f"{cpu_model()}, {counted(torch.get_num_threads(), 'thread')}"


def test_the_cpu_model_is_the_architecture_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", fail)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert cpu_model() == "arm64"


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99", "gpu", "cuda:-1", "cpu:1", "mps:1", "CUDA", "cuda0"])
def test_devices_that_this_machine_lacks_are_refused(name: str) -> None:
    with pytest.raises(DeviceError, match=name):
        resolve_device(name)


def test_mps_is_a_device_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mps = torch.backends.mps
    monkeypatch.setattr(mps, "is_available", lambda: False)
    monkeypatch.setattr(mps, "is_built", lambda: False)
    with pytest.raises(DeviceError, match=r"no MPS device \(mps\); found a torch that was built without MPS"):
        resolve_device("mps")
    monkeypatch.setattr(mps, "is_built", lambda: True)
    with pytest.raises(DeviceError, match=r"no Apple GPU.* Use --device cpu or auto"):
        resolve_device("mps")
    monkeypatch.setattr(mps, "is_available", lambda: True)
    assert resolve_device("mps") == torch.device("mps")
    assert device_name(torch.device("mps")) == "mps"
    assert describe_device(torch.device("mps")) == f"{cpu_model()}, MPS"
    with pytest.raises(DeviceError, match="computes in float64, which MPS does not have"):
        resolve_device("mps", needs_float64=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_device("auto") == CPU, "MPS is never chosen, only named"


@pytest.mark.parametrize(
    ("done", "text"),
    [
        (1000, "ETA 9.0 s"), (100, "ETA 1 min 39 s"), (10, "ETA 16 min 39 s"), (1, "ETA 2 h 47 min"),
    ],
)  # fmt: skip
def test_the_time_left_is_in_minutes_and_hours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, done: int, text: str
) -> None:
    """10 000 images, `done` of them in the first second."""
    now = [0.0]
    monkeypatch.setattr("cache_tools.console.time.monotonic", lambda: now[0])
    monkeypatch.setattr("cache_tools.console.LINE_EVERY_S", 0.5)
    with Progress("build", 10_000, "images") as progress:
        now[0] = 1.0
        progress.advance(done)
    (line, *_) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"build: {done:,}/10,000 images, ")
    assert line.endswith(text)


def test_the_rate_leaves_out_what_an_earlier_run_did(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("cache_tools.console.time.monotonic", lambda: now[0])
    with Progress("build", 1000, "images", done=400) as progress:
        now[0] = 12.0
        progress.advance(120)
    assert "build: 520/1,000 images, 10 images/s, ETA 48 s" in capsys.readouterr().err


def noisy() -> None:
    """What libraries do: warnings, and log messages with and without a logger of their own."""
    warnings.warn("a deprecated call", DeprecationWarning, stacklevel=1)
    warnings.warn("no GPU", UserWarning, stacklevel=1)
    logging.getLogger("timm.models").warning("a mapped name")
    logging.warning("QuickGELU mismatch")
    logging.getLogger("huggingface_hub.file_download").warning("unauthenticated requests")
    logging.getLogger("PIL.Image").error("a broken file")
    warn("a caution of ours")


def test_warnings_of_libraries_are_kept_off_the_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # a library's handler may hold an earlier test's stream
    root = list(logging.getLogger().handlers)
    command(noisy)()
    assert capsys.readouterr().err.splitlines() == ["a broken file", "warning: a caution of ours"]
    assert logging.getLogger().handlers == root
    assert logging.getLogger("timm").level == logging.NOTSET, "afterwards everything is as before"


def test_a_variable_shows_them(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_CACHE_WARNINGS", "1")
    with pytest.warns(UserWarning, match="no GPU"), pytest.warns(DeprecationWarning, match="deprecated"):
        command(noisy)()
    assert "a mapped name" in caplog.messages


def test_a_command_has_a_version() -> None:
    app = typer.Typer()
    app.command()(command(noisy))
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.stdout == f"teacher-cache {version('teacher-cache')}\n"
    assert shown.exit_code == 0
    assert "--version" in CliRunner().invoke(app, ["--help"]).stdout
