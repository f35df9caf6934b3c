"""Files and folders: check before reading, replace atomically, flush to the disk, remove what killed processes left."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

from cache_tools.errors import FormatError, StorageError

MAX_METADATA_BYTES = 64 << 20
MAX_FILE_BYTES = (1 << 30) + (1 << 28)  # the largest chunk (format.stored.MAX_CHUNK_BYTES) and what packing may add
PARTIAL = ".partial"  # the suffix of files and folders that are not finished
LEFTOVER_AGE_S = 3600.0
# NAME.UUID.partial; of earlier versions also NAME.PID.RANDOM.partial.
_PARTIAL_NAME = re.compile(r".\.([0-9a-f]{32}|[0-9]+\.[0-9a-f]{16})\.partial\Z")
HOME_VARIABLE = "TEACHER_CACHE_HOME"


def cache_home() -> Path:
    """$TEACHER_CACHE_HOME, or ~/.cache/teacher-cache."""
    return Path(os.environ.get(HOME_VARIABLE) or "~/.cache/teacher-cache").expanduser()


def check_file(path: Path, limit: int | None = None) -> None:
    """Check a file before reading it. A missing file or a folder passes: reading reports those.

    Args:
        limit: the largest size in bytes that the file may have.

    Raises:
        FormatError: the path is a pipe, device or socket, on which reading might block, or the file is too large.
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


def remove_leftovers(cache: Path) -> None:
    """Remove unfinished files and copies of a cache that killed processes left, if they are an hour old.

    Younger ones may belong to another builder that is still writing.
    """
    copies = f".{escape(cache.name)}.*{PARTIAL}"
    for path in (*cache.glob(f"*/*{PARTIAL}"), *cache.glob(f"*{PARTIAL}"), *find_leftovers(cache.parent, copies)):
        with suppress(FileNotFoundError):  # another process removes it
            if _age_s(path) > LEFTOVER_AGE_S:
                remove_leftover(path)


def find_leftovers(home: Path, pattern: str = f".*{PARTIAL}") -> list[Path]:
    """Find half-built and half-removed caches, an hour old, that killed commands left in a folder of caches."""
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
