"""A file that changes while the store's answer is interrupted: the reader starts again with the new file."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cache_tools.places import open_place
from tests.support.s3_server import has_loopback

pytestmark = pytest.mark.skipif(not has_loopback(), reason="needs the loopback interface")
OLD, NEW = b"old " * 100, b"new " * 200


class Store(ThreadingHTTPServer):
    """A store of one file. The first answer stops half-way; then the file is replaced, or deleted."""

    def __init__(self, now: bytes | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.now, self.requests = now, 0


class Handler(BaseHTTPRequestHandler):
    server: Store

    def do_GET(self) -> None:
        self.server.requests += 1
        if self.server.requests == 1:
            self._answer(200, OLD, tag="old", cut=True)
        elif self.server.now is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        elif self.headers.get("If-Match", '"new"') != '"new"':
            self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        else:
            self._answer(200, self.server.now, tag="new")

    def _answer(self, status: int, body: bytes, tag: str | None = None, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Mon, 05 Jan 2026 10:00:00 GMT")
        if tag:
            self.send_header("ETag", f'"{tag}"')
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with Store(request.param) as store:
        threading.Thread(target=store.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        yield store
        store.shutdown()


@pytest.mark.parametrize("store", [None], indirect=True)
def test_a_deleted_file_is_not_found(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        open_place("s3://bucket/cache").read("claims/0.0.0")
    assert store.requests > 1


@pytest.mark.parametrize("store", [NEW], indirect=True)
def test_a_replaced_file_is_read_from_the_start(store: Store) -> None:
    assert open_place("s3://bucket/cache").read("zarr.json") == NEW
    assert store.requests > 1
