"""A prefix of an object store as a place of files. Only this module uses obstore, and imports it when needed."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

from cache_tools.errors import NotFoundError, RecipeError
from cache_tools.files import MAX_FILE_BYTES, too_large
from cache_tools.storage.aws import S3Settings, own_endpoint, s3_settings
from cache_tools.storage.base import Entry, Place
from cache_tools.storage.store_errors import as_storage_error, is_final, is_missing_bucket, is_not_connected

_RETRIES, _FIRST_RETRIES = 12, 3
_ATTEMPTS = 8
PATIENCE_S = 180.0
# How long a store is tried that has never answered: a wrong endpoint or missing credentials show within seconds.
FIRST_PATIENCE_S, CONNECT_S = 4.0, 5.0

Answer = TypeVar("Answer")


class RemotePlace(Place):
    """A prefix of an object store.

    Credentials, endpoint and region of S3 are those that the AWS tools would use (`storage.aws`); other stores take
    them from the environment. Requests that fail for a passing reason are repeated.

    Args:
        patience_s: how long failed requests are repeated; PATIENCE_S by default.
    """

    def __init__(self, url: str, patience_s: float | None = None) -> None:
        self._url, self._patience_s = url.rstrip("/"), patience_s or PATIENCE_S
        self._settings = s3_settings() if self._url.lower().startswith(("s3://", "s3a://")) else None
        self._store = self._connect()

    def __str__(self) -> str:
        return self._url

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._url, self._patience_s)

    def read(self, key: str, limit: int = MAX_FILE_BYTES) -> bytes:
        import obstore
        from obstore.exceptions import BaseError, GenericError

        def get() -> bytes:
            answer = obstore.get(self._store, key)
            if answer.meta["size"] > limit:
                raise too_large(f"{self._url}/{key}", limit, answer.meta["size"])
            try:
                data: bytes = answer.bytes().to_bytes()
                return data
            except BaseError as error:  # obstore requests the rest, which fails if the file was replaced or removed
                raise GenericError("the answer was cut off") from error

        return self._request(key, get)

    def read_range(self, key: str, start: int, size: int) -> bytes:
        """Read a part of a file, which may end before `size` bytes.

        Raises:
            FileNotFoundError: no such file.
            StorageError: unreachable storage, or one that does not give parts.
        """
        import obstore

        def get() -> bytes:
            data: bytes = obstore.get_range(self._store, key, start=start, length=size).to_bytes()
            return data

        return self._request(key, get) if size else b""

    def entry(self, key: str) -> Entry:
        """What the store says of a file, without reading it. Raises FileNotFoundError if there is none."""
        import obstore

        return _entry(self._request(key, lambda: obstore.head(self._store, key)))

    def put(self, key: str, data: bytes, *, only_new: bool = False, durable: bool = True) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        mode = "create" if only_new else "overwrite"
        try:  # in one request, so that an interruption leaves nothing half-uploaded
            self._request(key, lambda: obstore.put(self._store, key, data, mode=mode, use_multipart=False))
        except AlreadyExistsError:
            # It may be our own file: the answer was lost and the request repeated.
            with suppress(FileNotFoundError):  # another's file, removed meanwhile
                return bool(data) and self.read(key) == data
            return False
        return True

    def delete(self, keys: Sequence[str]) -> None:
        import obstore

        for key in keys:
            with suppress(FileNotFoundError):
                self._request(key, lambda key=key: obstore.delete(self._store, key))  # type: ignore[misc]

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        import obstore

        batches = self._request(prefix, lambda: list(obstore.list(self._store, prefix or None)))
        for meta in (meta for batch in batches for meta in batch):
            yield _entry(meta)

    def folders(self) -> list[str]:
        import obstore

        paths = self._request("", lambda: obstore.list_with_delimiter(self._store)["common_prefixes"])
        names = (path.rstrip("/").rpartition("/")[2] for path in paths)
        return sorted(name for name in names if not name.startswith("."))

    def has(self, key: str) -> bool:
        import obstore

        try:
            self._request(key, lambda: obstore.head(self._store, key))
        except FileNotFoundError:
            return False
        return True

    def sibling(self, name: str) -> RemotePlace:
        return self._beside(f"{self._url.rpartition('/')[0]}/{name}")

    def child(self, name: str) -> RemotePlace:
        return self._beside(f"{self._url}/{name}")

    def tidy(self) -> None:
        """Nothing to do: object stores have no empty folders and no partial files."""

    def _beside(self, url: str) -> RemotePlace:
        """Another place of the same bucket."""
        place = RemotePlace.__new__(RemotePlace)
        vars(place).update(vars(self), _url=url)
        place._store = place._connect()
        return place

    def _connect(self) -> Any:
        """obstore's store. Until it has answered for the first time, it gives up within seconds."""
        self._is_patient = self._endpoint in _answering
        retries, retry_s = (_RETRIES, self._patience_s) if self._is_patient else (_FIRST_RETRIES, FIRST_PATIENCE_S)
        retry_s = min(retry_s, self._patience_s)
        environment = frozenset(os.environ.items())
        return _object_store(self._url, self._settings, self._patience_s, retry_s, retries, environment)

    def _request(self, key: str, request: Callable[[], Answer]) -> Answer:
        """Make a request; repeat it after a passing failure. obstore does not repeat one whose answer was cut off."""
        from obstore.exceptions import AlreadyExistsError, GenericError

        start = time.monotonic()
        with self._storage_errors(key):
            for attempt in range(1, _ATTEMPTS):
                try:
                    answer = request()
                    self._be_patient()
                    return answer
                except (FileNotFoundError, AlreadyExistsError):
                    self._be_patient()
                    raise
                except GenericError as error:
                    if is_final(error) or time.monotonic() - start > self._patience_s:
                        raise
                    if not self._is_patient and is_not_connected(error):
                        raise
                    self._be_patient()
                    time.sleep(random.uniform(0.5, 1.0) * 0.05 * 2**attempt)  # random: workers must not retry at once
            return request()

    def _be_patient(self) -> None:
        """From now on repeat requests for `patience_s`: something answers at the endpoint."""
        if not self._is_patient:
            _answering.add(self._endpoint)
            self._store = self._connect()

    @contextmanager
    def _storage_errors(self, key: str) -> Iterator[None]:
        """Turn obstore's exceptions into StorageError, except FileNotFoundError and AlreadyExistsError."""
        from obstore.exceptions import AlreadyExistsError, BaseError

        try:
            yield
        except AlreadyExistsError:
            raise
        except (BaseError, OSError) as error:  # obstore's error for a missing file is Python's
            if isinstance(error, FileNotFoundError) and not is_missing_bucket(error):
                raise
            where = f"{self._url}/{key}" if key else self._url
            region, keys_from = (self._settings.region, self._settings.keys_from) if self._settings else ("", "")
            raise as_storage_error(error, where, self._bucket, region, keys_from) from error

    @property
    def _endpoint(self) -> tuple[str, S3Settings | None]:
        """What has answered, if this place has: its bucket with these settings."""
        return self._bucket, self._settings

    @property
    def _bucket(self) -> str:
        """The URL without the path."""
        return "/".join(self._url.split("/")[:3])


def _entry(meta: Any) -> Entry:
    return Entry(meta["path"], meta["size"], meta["last_modified"].timestamp(), meta.get("e_tag"))


_answering: set[tuple[str, S3Settings | None]] = set()
"""What has answered in this process: it is there, and takes our keys."""


@lru_cache(maxsize=64)
def _object_store(
    url: str,
    settings: S3Settings | None,
    timeout_s: float,
    retry_s: float,
    retries: int,
    environment: frozenset[tuple[str, str]],
) -> Any:
    """obstore's store, which places of this process share: it has the connections, and takes milliseconds to make.

    Threads may use it at the same time; a forked process makes its own.

    Args:
        environment: the environment variables, from which obstore takes credentials, proxies and more.
    """
    try:
        import obstore
    except ImportError as error:
        raise NotFoundError(
            "object stores need the package obstore",
            where=url,
            next_step="install it: pip install 'teacher-cache[remote]'",
        ) from error
    is_plain = url.startswith("http://") or bool(settings and (settings.endpoint or "").startswith("http://"))
    options = {
        "allow_http": is_plain,
        "timeout": timedelta(seconds=timeout_s),
        "connect_timeout": timedelta(seconds=CONNECT_S),
    }
    try:
        with own_endpoint(settings):
            return obstore.store.from_url(
                url,
                client_options=options,
                retry_config={"max_retries": retries, "retry_timeout": timedelta(seconds=retry_s)},
                **(settings.store_arguments() if settings else {}),
            )
    except Exception as error:  # obstore raises ValueError, BaseError and its own panics for malformed URLs
        raise RecipeError(
            "not a URL of an object store",
            where=url,
            expected="s3://BUCKET/PATH, gs://…, az://… or http(s)://…",
            found=_first_line(error),
            next_step="set AZURE_STORAGE_ACCOUNT_NAME" if "Account must be specified" in str(error) else None,
        ) from error


os.register_at_fork(after_in_child=_object_store.cache_clear)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
