"""Shared by all commands: one-line errors with exit code 2, safe output, progress on terminals and in logs, devices."""

from __future__ import annotations

import copy
import errno
import functools
import inspect
import io
import json
import os
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, ParamSpec, Self, TextIO, get_args

from cache_tools.errors import CacheError, DeviceError, StorageError, printable
from cache_tools.system.arguments import check_arguments, path, require_current_folder
from cache_tools.system.quiet import quiet_libraries
from cache_tools.system.ranks import own_rank
from cache_tools.system.streams import (
    BROKEN_PIPE,
    discard_output,
    flush_streams,
    is_pipe_broken,
    open_missing_streams,
)
from cache_tools.units import counted, duration

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress as RichProgress

P = ParamSpec("P")
LINE_EVERY_S = 10.0
DEVICES = "auto, cpu, cuda, cuda:N or mps"
REPEATED_S, GRACE_S = 2.0, 4.0
OUT_OF_TIME = 75
"""Exit code of a command that --max-minutes has ended: EX_TEMPFAIL, run it again."""
_FIRST_STEPS = {  # next steps by error number
    errno.ENOENT: "check the path",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "make it writable",
    errno.EACCES: "fix its permissions",
    errno.EPERM: "fix its permissions",
    errno.ENOTDIR: "remove the file that is in the way",
    errno.EISDIR: "remove the folder that is in the way",
    errno.EMFILE: "allow more open files (`ulimit -n 256`)",
    errno.ENFILE: "close other programs, which have too many files open",
    errno.ESTALE: "wait until the network share is back, or mount it again",
}


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Decorate a typer command: one-line errors, the option --version, and no warnings of other libraries.

    A CacheError or a storage error becomes one line on stderr and exit code 2.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        kwargs.pop("version", None)
        open_missing_streams()
        with escaped_output():
            try:
                require_current_folder()
                check_arguments(own.parameters, kwargs)
                with interrupted_by_signals(), quiet_libraries():
                    function(*args, **kwargs)
                flush_streams()
            except CacheError as error:
                exit_with(str(error), 2)
            except Stopped as stopped:
                exit_with(f"{stopped.reason}. Run the same command again to resume.", stopped.code)
            except KeyboardInterrupt:
                exit_with("Interrupted. Run the same command again to resume.", 130)
            except OSError as error:
                if isinstance(error, BrokenPipeError) and is_pipe_broken():
                    discard_output()
                    raise SystemExit(BROKEN_PIPE) from None
                if error.errno is None:
                    raise
                exit_with(str(storage_error(error)), 2)

    own = inspect.signature(function, eval_str=True)
    own = own.replace(parameters=[_with_checked_path(parameter) for parameter in own.parameters.values()])
    option = inspect.Parameter("version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=version_option())
    wrapper.__signature__ = own.replace(parameters=[*own.parameters.values(), option])  # type: ignore[attr-defined]
    return wrapper


def run_app(app: Callable[[], object]) -> None:
    """Run a typer app. What typer prints itself, such as help, ends like the output of a command."""
    try:
        app()
    except SystemExit as end:  # typer's own answer to a reader that has gone is 1
        if end.code == 1 and is_pipe_broken():
            discard_output()
            raise SystemExit(BROKEN_PIPE) from None
        raise
    except OSError as error:
        if error.errno is None:
            raise
        discard_output()
        exit_with(str(storage_error(error)), 2)


class EscapedStream:
    """A text stream that escapes everything in what is written but printable characters and line ends.

    Whatever prints in a command (we, a library, a traceback) writes through it, so that no name in a received file
    reaches a terminal as it is.
    """

    def __init__(self, stream: TextIO) -> None:
        if isinstance(stream, io.TextIOWrapper):  # and characters that the encoding of the terminal lacks
            stream.reconfigure(errors="backslashreplace")
        self.unescaped = stream

    def write(self, text: str) -> int:
        self.unescaped.write(printable(text, keep="\n"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


@contextmanager
def escaped_output() -> Iterator[None]:
    """Inside, standard output and standard error are `EscapedStream`s."""
    before = sys.stdout, sys.stderr
    escape_output()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def escape_output() -> None:
    """Make standard output and standard error `EscapedStream`s, for the rest of the process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, EscapedStream):
            setattr(sys, name, EscapedStream(stream))


@contextmanager
def unescaped_output() -> Iterator[None]:
    """Inside, libraries may draw bars and colours: for downloads and trackers, which are given no raw names."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (getattr(stream, "unescaped", stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _with_checked_path(parameter: inspect.Parameter) -> inspect.Parameter:
    """The parameter of a command, where an empty path is an error: `Path("")` would be the current folder."""
    kind, *infos = getattr(parameter.annotation, "__metadata__", ()) and get_args(parameter.annotation)
    if not infos or not any(part is Path for part in (kind, *get_args(kind))):
        return parameter
    infos = [copy.copy(info) for info in infos]
    infos[0].parser = path
    return parameter.replace(annotation=Annotated[(kind, *infos)])


class Stopped(KeyboardInterrupt):
    """A signal, or a limit of time, that ends the process. Everything that cleans up after Ctrl-C cleans up after it.

    Attributes:
        reason: for people.
        code: exit code of the command.
    """

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason, code)
        self.reason, self.code = reason, code

    @classmethod
    def by_signal(cls, number: int) -> Stopped:
        return cls(f"Stopped by {signal.Signals(number).name}", 128 + number)


class StopRequest:
    """Lets work end where nothing is lost: it looks at `pending` there, and raises what that gives.

    Inside `deferred` the first signal only makes a request. If the work does not end within GRACE_S, or another signal
    comes, it is interrupted wherever it is. The limit of time counts from the making of this object.

    Args:
        max_minutes: the limit; None for none.
    """

    _active: ClassVar[StopRequest | None] = None

    def __init__(self, max_minutes: float | None = None) -> None:
        self._max_minutes = max_minutes
        self._end_s = float("inf") if max_minutes is None else time.monotonic() + 60.0 * max_minutes
        self._signal: int | None = None
        self._insists: threading.Timer | None = None

    @property
    def pending(self) -> Stopped | None:
        if self._signal is not None:
            return Stopped.by_signal(self._signal)
        if time.monotonic() >= self._end_s:
            return Stopped(f"Stopped after --max-minutes {self._max_minutes:g}", OUT_OF_TIME)
        return None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the first signal makes a request instead of an interruption."""
        before, StopRequest._active = StopRequest._active, self
        try:
            yield
        finally:
            StopRequest._active = before
            if self._insists is not None:
                self._insists.cancel()

    @classmethod
    def take(cls, number: int) -> bool:
        """Make a request of a signal; whether there is work that may still answer it."""
        self = cls._active
        if self is None or self._signal is not None:
            return False
        self._signal = number
        self._insists = threading.Timer(GRACE_S, os.kill, (os.getpid(), number))
        self._insists.daemon = True
        self._insists.start()
        return True


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Let SIGTERM (Slurm, Kubernetes, `kill`), SIGUSR1 (Slurm's `--signal`) and SIGHUP (a lost terminal) end a command
    as Ctrl-C does, or make a `StopRequest`.

    A scheduler may send the same signal several times at once: those that follow within REPEATED_S are ignored, so that
    the process can clean up. Signals that the caller ignores or handles, as `nohup` does, stay as they are.
    """
    last_s = float("-inf")

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last_s
        before_s, last_s = last_s, time.monotonic()
        if last_s - before_s > REPEATED_S and not StopRequest.take(number):
            raise Stopped.by_signal(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
    in_main = threading.current_thread() is threading.main_thread()  # Python handles signals there only
    numbers = [number for number in numbers if in_main and signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def version_option() -> Any:
    """The type of an option --version, which prints the version and ends the command."""
    import typer

    def show(wanted: bool) -> None:
        if wanted:
            from importlib.metadata import version

            print(f"teacher-cache {version('teacher-cache')}")
            raise typer.Exit

    return Annotated[bool, typer.Option("--version", help="Print the version and stop.", callback=show, is_eager=True)]


def exit_with(message: str, code: int) -> None:
    """Print one line on stderr and exit with `code`."""
    try:
        print_line(f"error: {message}" if code == 2 else message, file=sys.stderr)
        flush_streams()
    except OSError:  # nobody reads it
        discard_output()
    raise SystemExit(code)


def print_json(value: Any) -> None:
    """Print a value as indented JSON. Characters that could affect a terminal are escaped, as JSON allows."""
    print(printable_json(json.dumps(value, indent=2, ensure_ascii=False)))


def printable_json(text: str) -> str:
    """The same JSON with `\\u…` for every character in a string that is not printable."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text)


def print_line(text: str, *, file: TextIO | None = None) -> None:
    """Print text as one line, whatever names it holds: line ends in it are escaped too."""
    print(printable(text), file=file, flush=True)


def print_next(*words: object, file: TextIO | None = None) -> None:
    """Print the command that usually follows, quoted for a shell.

    Args:
        file: standard error for commands whose output others read line by line.
    """
    print_line(f"next: {shlex.join(str(word) for word in words)}", file=file)


def warn(message: str) -> None:
    """Print a warning as one line on stderr."""
    print_line(f"warning: {' '.join(message.split())}", file=sys.stderr)


def storage_error(error: OSError) -> StorageError:
    """Turn an error of the operating system about storage into a StorageError."""
    step = _FIRST_STEPS.get(error.errno or 0, "fix the cause")
    return StorageError(
        f"cannot write or read: {error.strerror or error}",
        where=error.filename,
        next_step=f"{step} or choose another --out, then run the same command again: committed work is kept",
    )


def resolve_device(name: str, *, needs_float64: bool = False) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; `auto` is CUDA where there is a GPU, else the CPU.

    Of several ranks on a machine each gets a CUDA device of its own, unless the name has a number.

    Args:
        needs_float64: refuse a device without float64.

    Raises:
        DeviceError: torch does not know the name, or this machine has no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError("no such device", where=name, expected=DEVICES) from error
    if device.type not in {"cpu", "cuda", "mps"} or (device.type != "cuda" and device.index):
        raise DeviceError("unsupported device", where=name, expected=DEVICES)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise DeviceError(
                "no such CUDA device",
                where=name,
                found=f"{count} CUDA device(s) on this machine",
                next_step="use --device cpu, or a machine with a CUDA build of torch and a GPU",
            )
        if ":" not in name and (rank := own_rank()).local_count > 1:
            if rank.local_count > count:
                raise DeviceError(
                    "more processes than CUDA devices",
                    where=name,
                    expected=f"at most {count} processes on this machine",
                    found=rank.local_count,
                    next_step=f"start torchrun with --nproc-per-node {count}",
                )
            return torch.device("cuda", rank.local)
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            built = torch.backends.mps.is_built()
            found = "no Apple GPU, or macOS before 14" if built else "a torch that was built without MPS"
            raise DeviceError("no MPS device", where=name, found=found, next_step="use --device cpu or auto")
        if needs_float64:
            raise DeviceError(
                "this command computes in float64, which MPS does not have",
                where=name,
                next_step="use --device cpu",
            )
    return device


def device_name(device: torch.device) -> str:
    """The name of the GPU, `mps`, or `cpu`."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def describe_device(device: torch.device) -> str:
    """The name of the GPU, or the model of the processor and the number of threads that torch uses."""
    import torch

    if device.type == "mps":
        return f"{cpu_model()}, MPS"
    return (
        device_name(device) if device.type == "cuda" else f"{cpu_model()}, {counted(torch.get_num_threads(), 'thread')}"
    )


def cpu_model() -> str:
    """The model of the processor; where there is no /proc/cpuinfo, its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


class Progress:
    """A rich bar with rate and ETA on a terminal; a plain line every ten seconds elsewhere.

    Use it as a context manager and call `advance(n)` after each piece of work, always from the same thread. Lines
    replace the bar outside the main thread and while another bar is on the screen.

    Args:
        summary: without a bar, print a last line even if the work took less than two seconds.
    """

    _bar_is_shown: ClassVar[bool] = False

    def __init__(self, title: str, total: int, unit: str, *, done: int = 0, summary: bool = False) -> None:
        self.title, self.total, self.unit, self.done, self.summary = printable(title), total, unit, done, summary
        self._note = ""
        self._first, self._start = done, time.monotonic()
        self._last_line = self._start
        alone = threading.current_thread() is threading.main_thread() and not Progress._bar_is_shown
        self._bar = self._rich_bar() if alone and sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            Progress._bar_is_shown = True
            self._bar.start()
            escape_output()  # rich has put streams of its own in place, which print above the bar
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            Progress._bar_is_shown = False
        elif kind is None and (self.summary or time.monotonic() - self._start > 2.0):
            self._print_line()

    def advance(self, count: int, note: str = "") -> None:
        """Count `count` more units as done; `note` (a loss, a metric) is shown after the figures."""
        self.done += count
        self._note = printable(note) or self._note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=f"{self._rate_text()} {self._note}")
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._print_line()

    @property
    def rate(self) -> float:
        """Units per second since the start of this run, without the work done before a resume."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def _rate_text(self) -> str:
        return f"{self.rate:,.0f} {self.unit}/s" if self.rate >= 10 else f"{self.rate:.2g} {self.unit}/s"

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        rate = self.rate
        eta = f", ETA {duration((self.total - self.done) / rate)}" if self.done < self.total and rate > 0 else ""
        note = f", {self._note}" if self._note else ""
        line = f"{self.title}: {self.done:,}/{self.total:,} {self.unit}, {self._rate_text()}{eta}{note}"
        print(line, file=sys.stderr, flush=True)

    def _rich_bar(self) -> RichProgress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
        )
        terminal = getattr(sys.stderr, "unescaped", sys.stderr)  # a bar is drawn with control characters
        bar = RichProgress(*columns, console=Console(file=terminal))
        self._task = bar.add_task(self.title, total=self.total, completed=self.done, rate="")
        return bar
