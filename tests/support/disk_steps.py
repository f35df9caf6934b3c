"""The steps in which a process changes the disk: count them, or end the process at one of them.

Only tests install this, and only in forked children: the hooks stay until the process ends.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

# Events of `sys.addaudithook` that change a folder, and the places of their paths among the arguments.
_CHANGES = {"os.rename": (0, 1), "os.link": (0, 1), "os.symlink": (1,), "os.remove": (0,), "os.mkdir": (0,),
            "os.rmdir": (0,), "os.truncate": (0,), "os.utime": (0,), "os.chmod": (0,)}  # fmt: skip
_FOLDERS = {"os.rename": (2, 3), "os.link": (2, 3), "os.symlink": (2,), "os.remove": (1,), "os.mkdir": (2,),
            "os.rmdir": (1,), "os.utime": (3,), "os.chmod": (2,)}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class DiskSteps:
    """Counts the steps below a folder.

    A step comes before each call that changes a name (open for writing, rename, link, remove, make a folder, …), before
    each flush, and before and after each request that changes an object store. A file that was just written adds two
    steps before the next call: the file is then cut to nothing, and to half of its bytes, as a process leaves it that
    is killed while it writes.

    Args:
        root: changes elsewhere are not counted.
        last: end this process with SIGKILL at the step of this number, counted from 1; None to count only.

    Attributes:
        steps: what each step was, for people.
        states: a digest of the names, sizes and times of all files at each step, if `last` is None. Two steps with the
            same one leave the same files.
    """

    def __init__(self, root: Path, last: int | None = None) -> None:
        self.steps: list[str] = []
        self.states: list[str] = []
        self._root, self._last = os.path.realpath(root), last
        self._lock, self._local = threading.RLock(), threading.local()

    def install(self) -> None:
        """Watch this process from now on."""
        import obstore

        watch_writing(self._on_writing)
        sys.addaudithook(self._on_event)

        def before_flush(flush: Callable[[int], None]) -> Callable[[Any], None]:
            def wrapper(file: Any) -> None:
                number = file if isinstance(file, int) else file.fileno()
                self._change("flush", [os.readlink(f"/proc/self/fd/{number}")])
                flush(number)

            return wrapper

        def around_request(request: Callable[..., Any], name: str) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                self._step(f"before {name} of an object")
                answer = request(*args, **kwargs)
                self._step(f"after {name} of an object")
                return answer

            return wrapper

        for name in ("fsync", "fdatasync"):
            setattr(os, name, before_flush(getattr(os, name)))
        for name in ("put", "delete"):
            setattr(obstore, name, around_request(getattr(obstore, name), name))

    def finish(self) -> None:
        """The last steps: what the command wrote last is cut, and the process ends after all its changes."""
        self._cut_written_file()
        self._step("at the end")

    def _on_writing(self, path: str, flags: int) -> None:
        if self._change("open", [path]) and (flags & os.O_TRUNC or not os.path.exists(path)):
            self._local.written = path

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES:
            folders = [arguments[place] for place in _FOLDERS.get(event, ()) if place < len(arguments)]
            folders += [None] * len(_CHANGES[event])
            places = zip(_CHANGES[event], folders, strict=False)
            paths = [_resolve(arguments[place], folder) for place, folder in places if not _is_number(arguments[place])]
            self._change(event.removeprefix("os."), paths)

    def _change(self, what: str, paths: list[str]) -> bool:
        """Take the steps before a change; whether it is one below the root."""
        inside = [path for path in paths if path == self._root or path.startswith(f"{self._root}{os.sep}")]
        if not inside or "__pycache__" in inside[0]:
            return False
        self._cut_written_file()
        self._step(f"before {what} {' → '.join(os.path.relpath(path, self._root) for path in inside)}")
        return True

    def _cut_written_file(self) -> None:
        path = getattr(self._local, "written", None)
        self._local.written = None
        try:
            size = 0 if path is None else os.stat(path).st_size
        except OSError:
            return
        if path is None or size == 0:
            return
        name = os.path.relpath(path, self._root)
        self._step(f"nothing of {name} is written", cut=(path, 0))
        self._step(f"half of {name} is written", cut=(path, size // 2))

    def _step(self, what: str, cut: tuple[str, int] | None = None) -> None:
        with self._lock:
            self.steps.append(what)
            if self._last is None:
                self.states.append(f"{_state(self._root)} {cut and cut[1]}")
            if len(self.steps) == self._last:
                if cut is not None:
                    os.truncate(*cut)
                os.kill(os.getpid(), signal.SIGKILL)


def _resolve(path: Any, folder: int | None) -> str:
    """The path without links in its parents; its last part is kept."""
    text = os.fsdecode(path)
    if folder is not None and folder >= 0 and not os.path.isabs(text):
        text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
    parent, name = os.path.split(os.path.abspath(text))
    return os.path.join(os.path.realpath(parent), name)


def watch_writing(opened: Callable[[str, int], None]) -> None:
    """Call `opened` with path and flags of each file that this process is about to open for writing, from now on."""
    local, open_file = threading.local(), os.open

    def open_in_folder(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        local.folder = dir_fd
        try:
            return open_file(path, flags, mode, dir_fd=dir_fd)
        finally:
            local.folder = None

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike) and arguments[2] & _WRITING:
            opened(_resolve(arguments[0], getattr(local, "folder", None)), arguments[2])

    sys.addaudithook(on_event)
    os.open = open_in_folder


def _state(root: str) -> str:
    found = []
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):  # removed by another thread
                status = os.lstat(os.path.join(folder, name))
                found.append((folder, name, status.st_size, 0 if name in folders else status.st_mtime_ns))
    return hashlib.blake2b(repr(sorted(found)).encode(), digest_size=8).hexdigest()


def _is_number(path: Any) -> bool:
    return isinstance(path, int)
