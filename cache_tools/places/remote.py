"""A prefix of an object store as a place of caches. Only this module uses obstore, and imports it when needed."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from cache_tools.errors import NotFoundError, RecipeError, StorageError
from cache_tools.files import MAX_FILE_BYTES, too_large
from cache_tools.places.base import Entry, Place

_CLIENT_ERROR = re.compile(r"status:? 4[0-9][0-9]")
_RETRIES = 12
_ATTEMPTS = 8
PATIENCE_S = 180.0

Answer = TypeVar("Answer")


class RemotePlace(Place):
    """A prefix of an object store.

    Credentials, region and endpoint come from the environment, as for every S3 tool (`AWS_ACCESS_KEY_ID`,
    `AWS_ENDPOINT_URL`, …). Requests that fail for a passing reason are repeated.

    Args:
        patience_s: how long failed requests are repeated; PATIENCE_S by default.
    """

    def __init__(self, url: str, patience_s: float | None = None) -> None:
        self._url, self._patience_s = url.rstrip("/"), patience_s or PATIENCE_S
        self._store = _object_store(self._url, self._patience_s)

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
            yield Entry(meta["path"], meta["size"], meta["last_modified"].timestamp())

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
        return RemotePlace(f"{self._url.rpartition('/')[0]}/{name}")

    def child(self, name: str) -> RemotePlace:
        return RemotePlace(f"{self._url}/{name}")

    def tidy(self) -> None:
        """Nothing to do: object stores have no empty folders and no partial files."""

    def _request(self, key: str, request: Callable[[], Answer]) -> Answer:
        """Make a request; repeat it after a passing failure. obstore does not repeat one whose answer was cut off."""
        from obstore.exceptions import GenericError

        start = time.monotonic()
        with self._storage_errors(key):
            for attempt in range(1, _ATTEMPTS):
                try:
                    return request()
                except GenericError as error:
                    if _CLIENT_ERROR.search(str(error)) or time.monotonic() - start > self._patience_s:
                        raise
                    time.sleep(random.uniform(0.5, 1.0) * 0.05 * 2**attempt)  # random: workers must not retry at once
            return request()

    @contextmanager
    def _storage_errors(self, key: str) -> Iterator[None]:
        """Turn obstore's exceptions into StorageError, except FileNotFoundError and AlreadyExistsError."""
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
                next_step="check the URL, AWS_ENDPOINT_URL and the network, then run the same command: it continues",
            ) from error


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


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
