"""Where the home keeps what is needed of a remote cache, or built for it: a folder that is made in one step."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache_tools.console import storage_error
from cache_tools.durable import PARTIAL, rename_unless_taken, sync_folder
from cache_tools.errors import StorageError
from cache_tools.manifest import Manifest
from cache_tools.metadata_transfer import copy_metadata
from cache_tools.place import LocalPlace, Place
from cache_tools.registry import is_cache


def bring_metadata(place: Place, mirror: Path, manifest: Manifest) -> list[int]:
    """Have a mirror hold the metadata, labels, keys and constants of the remote cache: it is none, or a whole one.

    Any number of processes may do so at once: they come once.

    Returns:
        sizes of the files that came.

    Raises:
        MismatchError: the same cache is there with other constants or blocks.
        StorageError: something else is there, a full or read-only disk, an unreachable store.
    """
    with _alone(mirror):
        if is_cache(mirror):
            return copy_metadata(place, LocalPlace(mirror), manifest)
        temporary = mirror.with_name(f".{mirror.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            sizes = copy_metadata(place, LocalPlace(temporary), manifest)
            rename_unless_taken(temporary, mirror)
            sync_folder(mirror.parent)
        except OSError as error:
            raise storage_error(error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if not is_cache(mirror):
            raise StorageError(
                "cannot make a mirror here: the place is taken", where=mirror, next_step="remove what is there"
            )
        return sizes


@contextmanager
def _alone(mirror: Path) -> Iterator[None]:
    """Keep other processes from bringing the same metadata. The system gives the lock up with the process."""
    try:
        import fcntl

        folder = _opened(mirror)
    except ImportError:  # not on Windows: it comes twice
        yield
        return
    except OSError as error:
        raise storage_error(error) from error
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):  # not empty, unless nothing came
            mirror.rmdir()
        os.close(folder)


def _opened(mirror: Path) -> int:
    """A descriptor of the folder, made if need be; another process for which nothing came may just remove it."""
    while True:
        mirror.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return os.open(mirror, os.O_RDONLY)
