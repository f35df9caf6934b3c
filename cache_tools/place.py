"""Where a cache can be: a folder, or a prefix of an object store (s3://, gs://, az://, http://…).

A place holds whole files under relative keys with `/`. Whatever is put is there in full or not at all. Only
this module knows obstore; nothing is imported from it until a URL is used.
"""

from __future__ import annotations

import errno
import os
import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from cache_tools.console import storage_error
from cache_tools.durable import PARTIAL, put_durably, sync_folder
from cache_tools.errors import NotFoundError, RecipeError, StorageError
from cache_tools.files import MAX_FILE_BYTES, check_file, too_large

_CLIENT_ERROR = re.compile(r"status:? 4[0-9][0-9]")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_FILE = "file://"
_RETRIES = 12
_ATTEMPTS = 8
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
PATIENCE_S = 180.0

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Entry:
    """One file of a place: its key, its size in bytes, and when it was written by the place's own clock (s)."""

    key: str
    size: int
    modified_s: float


class Place(ABC):
    """A folder or a prefix of an object store. `str(place)` is what a user would type."""

    @abstractmethod
    def __str__(self) -> str: ...

    @property
    def name(self) -> str:
        """The last part of its path."""
        return str(self).rstrip("/").rpartition("/")[2]

    @abstractmethod
    def read(self, key: str, limit: int = MAX_FILE_BYTES) -> bytes:
        """A whole file.

        Args:
            limit: the most bytes that it can have.

        Raises:
            FileNotFoundError: not there.
            FormatError: a file that is larger, or no file; nothing of it is read.
            StorageError: unreadable storage.
        """

    @abstractmethod
    def put(self, key: str, data: bytes, *, only_new: bool = False, durable: bool = True) -> bool:
        """Write a whole file, replacing what is there; with `only_new` leave that alone and give False.

        What is put with `only_new` must be unlike what others put there: an object store whose answer got lost is asked
        again, and then tells its own file by the contents.

        Args:
            durable: whether it must outlive a power cut; without that a disk is ten times as fast.

        Raises:
            StorageError: full, read-only or unreachable storage.
        """

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Remove files; those that are not there are no error."""

    @abstractmethod
    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """All files below `prefix` (a folder, or nothing for all), unordered; no leftovers of interrupted writes."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Names of what is directly in it and holds files, sorted; hidden ones left out."""

    @abstractmethod
    def has(self, key: str) -> bool:
        """Whether a file is there.

        Raises:
            StorageError: unreachable storage.
        """

    def keys(self, prefix: str = "") -> Iterator[str]:
        """The keys of `entries`; a folder gives them faster, as it need not look at each file."""
        return (entry.key for entry in self.entries(prefix))

    def sibling(self, name: str) -> Place:
        """A place beside this one."""
        return open_place(f"{str(self).rstrip('/').rpartition('/')[0]}/{name}")

    @abstractmethod
    def tidy(self) -> None:
        """Leave nothing where no file is: no empty folder, no leftovers of interrupted writes."""

    def child(self, name: str) -> Place:
        """A place inside this one."""
        return open_place(f"{str(self).rstrip('/')}/{name}")


class LocalPlace(Place):
    """A folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, key: str, limit: int = MAX_FILE_BYTES) -> bytes:
        check_file(self.path / key, limit)
        with _local_trouble():
            return (self.path / key).read_bytes()

    def put(self, key: str, data: bytes, *, only_new: bool = False, durable: bool = True) -> bool:
        file = self.path / key
        with _local_trouble():
            for _ in range(_ATTEMPTS):
                file.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # another process has just removed the empty folder: make it again
                    return _put_new(file, data, durable) if only_new else _put(file, data, durable)
        raise StorageError("the folder vanishes again and again", where=file.parent)

    def delete(self, keys: Sequence[str]) -> None:
        with _local_trouble():
            for key in keys:
                (self.path / key).unlink(missing_ok=True)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        for key in self.keys(prefix):
            try:
                status = (self.path / key).stat()
            except FileNotFoundError:  # replaced or removed meanwhile
                continue
            yield Entry(key, status.st_size, status.st_mtime)

    def keys(self, prefix: str = "") -> Iterator[str]:
        for folder, _, names in os.walk(self.path / prefix):
            inside = Path(folder).relative_to(self.path)
            yield from ((inside / name).as_posix() for name in names if not name.endswith(PARTIAL))

    def has(self, key: str) -> bool:
        with _local_trouble():
            return (self.path / key).is_file()

    def folders(self) -> list[str]:
        with _local_trouble(), os.scandir(self.path) as found:
            return sorted(entry.name for entry in found if entry.is_dir() and not entry.name.startswith("."))

    def sibling(self, name: str) -> LocalPlace:
        return LocalPlace(self.path.absolute().with_name(name))

    def tidy(self) -> None:
        with suppress(OSError):  # not empty, or not there
            for file in self.path.glob(f"*{PARTIAL}"):  # of a process that was killed
                if time.time() - file.stat().st_mtime > PATIENCE_S:
                    file.unlink()
            self.path.rmdir()


class RemotePlace(Place):
    """A prefix of an object store. Credentials, region and endpoint come from the environment, as for every S3 tool
    (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …); requests that fail in passing are tried again.

    Args:
        patience_s: for how long a request is tried again; PATIENCE_S by default.
    """

    def __init__(self, url: str, patience_s: float | None = None) -> None:
        self._url, self._patience_s = url.rstrip("/"), patience_s or PATIENCE_S
        self._store = _object_store(self._url, self._patience_s)

    def __str__(self) -> str:
        return self._url

    def read(self, key: str, limit: int = MAX_FILE_BYTES) -> bytes:
        import obstore
        from obstore.exceptions import BaseError, GenericError

        def get() -> bytes:
            answer = obstore.get(self._store, key)
            if answer.meta["size"] > limit:
                raise too_large(f"{self._url}/{key}", limit, answer.meta["size"])
            try:
                return answer.bytes().to_bytes()
            except BaseError as error:  # obstore asks for the rest; not to be had if the file was replaced or removed
                raise GenericError("the answer broke off") from error

        return self._ask(key, get)

    def put(self, key: str, data: bytes, *, only_new: bool = False, durable: bool = True) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        mode = "create" if only_new else "overwrite"
        try:  # in one request, so that a cut leaves nothing half-uploaded behind
            self._ask(key, lambda: obstore.put(self._store, key, data, mode=mode, use_multipart=False))
        except AlreadyExistsError:
            # Ours after all, if the answer was lost and the request repeated.
            with suppress(FileNotFoundError):  # another's, and gone again
                return bool(data) and self.read(key) == data
            return False
        return True

    def delete(self, keys: Sequence[str]) -> None:
        import obstore

        for key in keys:
            with suppress(FileNotFoundError):
                self._ask(key, lambda key=key: obstore.delete(self._store, key))  # type: ignore[misc]

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        import obstore

        batches = self._ask(prefix, lambda: list(obstore.list(self._store, prefix or None)))
        for meta in (meta for batch in batches for meta in batch):
            yield Entry(meta["path"], meta["size"], meta["last_modified"].timestamp())

    def folders(self) -> list[str]:
        import obstore

        paths = self._ask("", lambda: obstore.list_with_delimiter(self._store)["common_prefixes"])
        names = (path.rstrip("/").rpartition("/")[2] for path in paths)
        return sorted(name for name in names if not name.startswith("."))

    def has(self, key: str) -> bool:
        import obstore

        try:
            self._ask(key, lambda: obstore.head(self._store, key))
        except FileNotFoundError:
            return False
        return True

    def tidy(self) -> None:
        """Object stores have no empty folders."""

    def _ask(self, key: str, request: Callable[[], Answer]) -> Answer:
        """Make a request, again if it failed in passing: obstore does not repeat one that broke off in its answer."""
        from obstore.exceptions import GenericError

        start = time.monotonic()
        with self._trouble(key):
            for attempt in range(1, _ATTEMPTS):
                try:
                    return request()
                except GenericError as error:
                    if _CLIENT_ERROR.search(str(error)) or time.monotonic() - start > self._patience_s:
                        raise
                    time.sleep(random.uniform(0.5, 1.0) * 0.05 * 2**attempt)  # many workers must not come back at once
            return request()

    @contextmanager
    def _trouble(self, key: str) -> Iterator[None]:
        """Turn what obstore raises into our errors; FileNotFoundError and AlreadyExistsError stay."""
        from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError

        where = f"{self._url}/{key}" if key else self._url
        try:
            yield
        except (FileNotFoundError, AlreadyExistsError):
            raise
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise StorageError(
                "no permission",
                where=where,
                found=_first_line(error),
                next_step="check credentials and rights (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, …)",
            ) from error
        except (BaseError, OSError) as error:
            raise StorageError(
                "the object store does not answer as it should",
                where=where,
                found=_first_line(error),
                next_step="check the URL, AWS_ENDPOINT_URL and the network; the same command goes on where it stopped",
            ) from error


def _put(file: Path, data: bytes, durable: bool) -> bool:
    if durable:
        put_durably(file, data)
    else:
        temporary = _partial(file)
        temporary.write_bytes(data)
        temporary.replace(file)
    return True


def _put_new(file: Path, data: bytes, durable: bool) -> bool:
    """Written in full under another name first: a link appears whole or, if the name is taken, not at all."""
    temporary = _partial(file)
    try:
        _put(temporary, data, durable)
        os.link(temporary, file)
        if durable:
            sync_folder(file.parent)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_new(file, data)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _partial(file: Path) -> Path:
    return file.with_name(f"{file.name}.{os.getpid()}.{os.urandom(8).hex()}{PARTIAL}")


def _create_new(file: Path, data: bytes) -> bool:
    """Where there are no hard links (exFAT, some network shares): for a moment the file is there without its bytes."""
    try:
        with file.open("xb") as stream:
            stream.write(data)
    except FileExistsError:
        return False
    return True


def open_place(reference: str | Path, *, patience_s: float | None = None) -> Place:
    """The place of a path or URL, whether anything is there or not.

    Args:
        patience_s: for how long requests to an object store are tried again; PATIENCE_S by default.

    Raises:
        RecipeError: a URL of an unknown scheme, or one that cannot be a place.
        NotFoundError: a URL, and obstore is not installed.
    """
    if is_remote(reference):
        return RemotePlace(str(reference), patience_s)
    return LocalPlace(Path(os.path.expanduser(str(reference).removeprefix(_FILE))))


def is_url(reference: str | Path) -> bool:
    """Whether a reference is a URL rather than a path or a name."""
    return isinstance(reference, str) and _SCHEME.match(reference) is not None


def is_remote(reference: str | Path) -> bool:
    """Whether a reference is the URL of something in an object store; `file://…` is a folder."""
    return is_url(reference) and not str(reference).startswith(_FILE)


def local_folder(out: str | None) -> Path | None:
    """What a user gave to `--out` of a command that writes to disks only, as a path; None as it is.

    Raises:
        RecipeError: an object store.
    """
    if out is None:
        return None
    place = None if is_remote(out) else open_place(out)
    if not isinstance(place, LocalPlace):
        raise RecipeError(
            "this command writes to a folder, not to an object store",
            where=out,
            next_step="leave --out away and copy the cache there with `cache-tools push`",
        )
    return place.path


def _object_store(url: str, patience_s: float) -> Any:
    try:
        import obstore
    except ImportError as error:
        raise NotFoundError(
            "object stores need the package obstore",
            where=url,
            next_step="install it: pip install 'teacher-cache[remote]'",
        ) from error
    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://") or url.startswith("http://")
    try:
        return obstore.store.from_url(
            url,
            client_options={"allow_http": plain, "timeout": timedelta(seconds=patience_s)},
            retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=patience_s)},
        )
    except Exception as error:  # obstore raises ValueError, BaseError and its own panics for malformed URLs
        raise RecipeError(
            "not a URL of an object store",
            where=url,
            expected="s3://BUCKET/PATH, gs://…, az://… or http(s)://…",
            found=_first_line(error),
        ) from error


@contextmanager
def _local_trouble() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        raise storage_error(error) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
