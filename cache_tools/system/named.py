"""What this user has named in a command or recipe: stores, networks and modules of code.

A received cache, run or checkpoint names such things too. That is no request of the user: nothing is contacted,
downloaded or imported because of it, unless the user has named the same thing before. The record is a file per kind in
the user's own state folder, never in a cache home, which may be shared or received.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Literal

Kind = Literal["stores", "networks", "modules"]

MAX_BYTES = 1 << 20
_in_process: set[tuple[Kind, str]] = set()


def state_folder() -> Path:
    """$XDG_STATE_HOME/teacher-cache, or ~/.local/state/teacher-cache."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "teacher-cache"


def remember(kind: Kind, entry: str) -> None:
    """Record that the user has named something. Where nothing can be recorded, it holds for this process only."""
    if (kind, entry) in _in_process:
        return
    _in_process.add((kind, entry))
    with suppress(OSError, RuntimeError):  # a read-only home, or none
        if entry in _recorded(kind) or "\n" in entry:
            return
        file = _file(kind)
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "a", encoding="utf-8") as lines:
            lines.write(f"{entry}\n")


def is_named(kind: Kind, entry: str) -> bool:
    """Whether the user has named this before, here or in an earlier process."""
    return (kind, entry) in _in_process or entry in _recorded(kind)


def _file(kind: Kind) -> Path:
    return state_folder() / f"{kind}.txt"


def _recorded(kind: Kind) -> set[str]:
    """The entries of earlier processes; none if somebody else could have written the file."""
    try:
        descriptor = os.open(_file(kind), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, encoding="utf-8") as lines:
            status = os.fstat(lines.fileno())
            is_ours = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
            if not stat.S_ISREG(status.st_mode) or not is_ours or (os.name == "posix" and status.st_mode & 0o022):
                return set()
            return set(lines.read(MAX_BYTES).split("\n"))
    except (OSError, UnicodeDecodeError, RuntimeError):
        return set()
