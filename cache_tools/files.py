"""Look at a file before it is read: what is shared may hold anything."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cache_tools.errors import FormatError

MAX_METADATA_BYTES = 64 << 20
MAX_FILE_BYTES = (1 << 30) + (1 << 28)  # the largest chunk (limits.MAX_CHUNK_BYTES) and what packing may add


def check_file(path: Path, limit: int | None = None) -> None:
    """Nothing for a file, a folder, or nothing at all: reading it says what is wrong.

    Args:
        limit: the most bytes that it can have.

    Raises:
        FormatError: a pipe, device or socket, which reading might wait for for ever, or a file that is too large.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return
    if stat.S_ISDIR(status.st_mode):
        return
    if not stat.S_ISREG(status.st_mode):
        raise FormatError("not a file", where=path, found="a pipe, device or socket", next_step="remove it")
    if limit is not None and status.st_size > limit:
        raise too_large(path, limit, status.st_size)


def too_large(where: object, limit: int, size: int) -> FormatError:
    """What to raise of a file that has more bytes than it can have."""
    return FormatError("a file is larger than it can be", where=where, expected=f"at most {limit:,} bytes", found=size)
