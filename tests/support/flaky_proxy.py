"""A real HTTP proxy on 127.0.0.1 in front of a server, for tests: it counts, fails some requests, or stops answering.

A failure is one of five that a busy or broken store shows: 500, 503, a connection closed before the request was
passed on, after it was done but before the answer (the work is done and nobody knows), or in the middle of the answer.
"""

from __future__ import annotations

import http.client
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

FAILURES = ("500", "503", "refused", "lost", "cut")
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass(frozen=True)
class Seen:
    """One request: `sent`, `received` are bytes of its body and of the answer's; `failure` one of FAILURES, or None."""

    method: str
    path: str
    sent: int
    received: int
    failure: str | None


class FlakyProxy:
    """Made by `flaky_proxy`.

    Attributes:
        rate: part of the requests that fail, 0 to begin with.
        seen: every request that was answered, or failed on purpose.
        full: set when `stop_after` has stopped a request.
    """

    def __init__(self, upstream: str, seed: int) -> None:
        self.rate, self.seen, self.full = 0.0, list[Seen](), threading.Event()
        self.upstream = urlsplit(upstream)
        self._random, self._lock = random.Random(seed), threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._left: int | None = None
        self._open = threading.Event()
        self._open.set()

    def fail(self, rate: float) -> None:
        """From now on this part of the requests fails."""
        self.rate = rate

    @contextmanager
    def gone(self) -> Iterator[None]:
        """Fail everything for the time of a `with` block, in which nobody waits long for an answer."""
        from cache_tools.home import staging
        from cache_tools.places import remote

        with pytest.MonkeyPatch.context() as patch:
            for module in (remote, staging):
                patch.setattr(module, "PATIENCE_S", 1.0)
            before, self.rate = self.rate, 1.0
            yield
            self.rate = before

    def stop_after(self, requests: int) -> None:
        """Answer so many more requests, then none until `go_on`; `full` says when the first one waits."""
        with self._lock:
            self._left = requests
            self.full.clear()
            self._open.clear()

    def go_on(self) -> None:
        """Answer again. Requests that waited meanwhile fail: whoever sent them may be gone."""
        with self._lock:
            self._left = None
            self._open.set()

    def reached(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until a condition on what was seen holds."""
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)

    def forget(self) -> None:
        """Count from nothing."""
        with self._lock:
            self.seen.clear()

    def paths(self, method: str) -> list[str]:
        """What was asked for with this method and not failed, in order."""
        return [request.path for request in self.seen if request.method == method and request.failure is None]

    def gate(self) -> bool:
        """Whether a request may pass; waits where it may not."""
        with self._lock:
            if self._left is None:
                return True
            if self._left > 0:
                self._left -= 1
                return True
        self.full.set()
        self._open.wait()
        return False

    def choose(self) -> str | None:
        with self._lock:
            return self._random.choice(FAILURES) if self._random.random() < self.rate else None

    def note(self, seen: Seen) -> None:
        with self._changed:
            self.seen.append(seen)
            self._changed.notify_all()


@contextmanager
def flaky_proxy(seed: int = 0) -> Iterator[FlakyProxy]:
    """A proxy in front of the S3 server that the environment points to; inside, the environment points to the proxy."""
    before = os.environ["AWS_ENDPOINT_URL"]
    proxy = FlakyProxy(before, seed)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        try:
            yield proxy
        finally:
            proxy.go_on()
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away, as killed ones do, is no error of the proxy."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version, proxy = "HTTP/1.1", FlakyProxy("http://127.0.0.1:9", 0)

    def _serve(self) -> None:
        proxy, body = self.proxy, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        passed, failure = proxy.gate(), None
        if passed:
            failure = proxy.choose()
        if not passed or failure == "refused":
            return self._hang_up(len(body), 0, "refused")
        if failure in {"500", "503"}:
            proxy.note(Seen(self.command, self.path, len(body), 0, failure))
            return self._answer(int(failure), "Slow Down" if failure == "503" else "Internal Server Error", [], b"")
        status, reason, headers, answer = self._upstream(body)
        if failure == "lost" or (failure == "cut" and not answer):
            return self._hang_up(len(body), 0, "lost")
        if failure == "cut":
            self._answer(status, reason, headers, answer[: len(answer) // 2], length=len(answer))
            return self._hang_up(len(body), len(answer) // 2, "cut")
        proxy.note(Seen(self.command, self.path, len(body), len(answer), None))
        return self._answer(status, reason, headers, answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _upstream(self, body: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.proxy.upstream.hostname or "", self.proxy.upstream.port)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
            connection.request(self.command, self.path, body=body or None, headers=headers)
            response = connection.getresponse()
            return response.status, response.reason, response.getheaders(), response.read()
        finally:
            connection.close()

    def _answer(
        self, status: int, reason: str, headers: list[tuple[str, str]], body: bytes, *, length: int | None = None
    ) -> None:
        self.send_response_only(status, reason)
        stated = {name.lower(): value for name, value in headers}.get("content-length", "0")
        for name, value in headers:
            if name.lower() not in _HOP:
                self.send_header(name, value)
        size = stated if self.command == "HEAD" else str(len(body) if length is None else length)
        self.send_header("Content-Length", size)
        self.end_headers()
        self.wfile.write(body)

    def _hang_up(self, sent: int, received: int, failure: str) -> None:
        self.proxy.note(Seen(self.command, self.path, sent, received, failure))
        self.close_connection = True
        self.wfile.flush()
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""
