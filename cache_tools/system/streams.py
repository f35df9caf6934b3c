"""The standard streams of a command, which its caller may have closed, or may stop reading."""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress

BROKEN_PIPE = 128 + 13  # the exit code of a process that SIGPIPE ends, as shells show it


def open_missing_streams() -> None:
    """Connect streams that the caller has closed (`>&-`) to the null device.

    Otherwise the next file that is opened gets the number of the stream, and a library that prints would write into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)


def flush_streams() -> None:
    """Write what is printed so far; OSError where it cannot be written."""
    sys.stdout.flush()
    sys.stderr.flush()


def is_pipe_broken() -> bool:
    """Whether the reader of stdout or stderr is gone, as in `cache-tools ls | head -1`."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            poll.register(stream.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def discard_output() -> None:
    """Drop what is not written yet, so that Python does not try again, and fail, when it ends."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                os.dup2(null, stream.fileno())
        os.close(null)
