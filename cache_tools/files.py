"""Look at a file before it is read: what is shared may hold anything."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
import uuid
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

from cache_tools.errors import FormatError, StorageError

MAX_METADATA_BYTES = 64 << 20
MAX_FILE_BYTES = (1 << 30) + (1 << 28)  # the largest chunk (format.stored.MAX_CHUNK_BYTES) and what packing may add


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


PARTIAL = ".partial"
LEFTOVER_AGE_S = 3600.0


def put_durably(path: Path, data: Any) -> None:
    """Replace a file atomically; its bytes are on the disk before its name is, and its name before this returns."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def output_folder(folder: Path, what: str) -> Path:
    """A folder for something to be written, made now: a place that cannot be written is better known before the work.

    Raises:
        StorageError: a file is there.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"a file is where the {what} should be", where=folder, next_step="choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk; quietly nothing where the file system cannot."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Flush every file and folder below `root` to the disk."""
    for folder, _, files in os.walk(root):
        for name in files:
            descriptor = os.open(Path(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(folder))


def rename_unless_taken(temporary: Path, path: Path) -> None:
    """Rename a folder into place; leave it where it is if another process was faster."""
    try:
        os.rename(temporary, path)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise


def remove_leftovers(cache: Path) -> None:
    """Remove what killed processes left behind: half-written files and half-made caches, when an hour old.

    The age keeps what another builder is writing right now.
    """
    own = f".{escape(cache.name)}.*{PARTIAL}"
    for path in (*cache.glob(f"*/*{PARTIAL}"), *cache.glob(f"*{PARTIAL}"), *leftovers(cache.parent, own)):
        with suppress(FileNotFoundError):  # another process removes it
            if _age_s(path) > LEFTOVER_AGE_S:
                remove_leftover(path)


def leftovers(home: Path, pattern: str = f".*{PARTIAL}") -> list[Path]:
    """What killed commands left behind in a folder of caches: half-made and half-removed ones, an hour old."""
    found = []
    for path in home.glob(pattern):
        with suppress(FileNotFoundError):
            if _age_s(path) > LEFTOVER_AGE_S:
                found.append(path)
    return sorted(found)


def remove_leftover(path: Path) -> None:
    """Remove a file, a link or a whole folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _age_s(path: Path) -> float:
    return time.time() - path.lstat().st_mtime
