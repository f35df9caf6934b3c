"""Files and folders: check before reading, replace atomically, flush to the disk, remove what killed processes left."""

from __future__ import annotations

import errno
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from cache_tools.errors import FormatError, StorageError
from cache_tools.system.arguments import expand_user

MAX_METADATA_BYTES = 64 << 20
MAX_FILE_BYTES = (1 << 30) + (1 << 28)  # the largest chunk (format.stored.MAX_CHUNK_BYTES) and what packing may add
PARTIAL = ".partial"  # the suffix of files and folders that are not finished
LEFTOVER_AGE_S = 3600.0
# NAME.UUID.partial; of earlier versions also NAME.PID.RANDOM.partial.
_PARTIAL_NAME = re.compile(r".\.([0-9a-f]{32}|[0-9]+\.[0-9a-f]{16})\.partial\Z")
HOME_VARIABLE = "TEACHER_CACHE_HOME"


def cache_home() -> Path:
    """$TEACHER_CACHE_HOME, or ~/.cache/teacher-cache."""
    return expand_user(os.environ.get(HOME_VARIABLE) or "~/.cache/teacher-cache")


def too_large(where: object, limit: int, size: int) -> FormatError:
    """The error for a file of `size` bytes where at most `limit` are possible."""
    return FormatError("a file is larger than it can be", where=where, expected=f"at most {limit:,} bytes", found=size)


def is_partial(name: str) -> bool:
    """Whether a name is one that we give to unfinished files and folders, now or in earlier versions."""
    return _PARTIAL_NAME.search(name) is not None


@contextmanager
def replaced_durably(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` atomically and durably when the block ends without an error.

    The bytes are on the disk before the file gets its name, and the name is on the disk before this returns. `path` is
    the user's: links on the way to it are followed. A file below a cache or a run is written with `SafeFolder`.
    """
    _remove_old_partials(path.parent)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@cache
def _remove_old_partials(folder: Path) -> None:
    """Remove the unfinished files, an hour old, that killed processes left in a folder. A process looks only once."""
    with suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            is_file = is_partial(entry.name) and entry.is_file(follow_symlinks=False)
            if is_file and abs(time.time() - entry.stat(follow_symlinks=False).st_mtime) > LEFTOVER_AGE_S:
                with suppress(OSError):  # another process removes it
                    os.unlink(entry.path)


def put_durably(path: Path, data: Any) -> None:
    """Replace the content of a file atomically and durably."""
    with replaced_durably(path) as file:
        file.write(data)


def output_folder(folder: Path, what: str) -> Path:
    """Create the folder for an output, so that a folder that cannot be written fails before the work starts.

    Args:
        what: names the output in the error message.

    Raises:
        StorageError: there is a file at `folder`.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"a file is where the {what} should be", where=folder, next_step="choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk; do nothing where the file system cannot."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_descriptor(folder: int) -> None:
    """As `sync_folder`, for an open folder."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise


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


def rename_unless_exists(temporary: Path, path: Path) -> None:
    """Rename a folder to `path`; leave it if another process has created `path` first."""
    try:
        os.rename(temporary, path)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
