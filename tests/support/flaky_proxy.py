"""An HTTP proxy on 127.0.0.1 that records requests, and fails or holds some of them.

It fails requests in five ways, as busy and broken stores do: with 500, with 503, with a connection closed before the
request is passed on ("refused"), after the server has done it ("lost"), or in the middle of the answer ("cut").
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
    """One request: bytes of its body (`sent`) and of the answer (`received`); `failure` is one of FAILURES, or None."""

    method: str
    path: str
    sent: int
    received: int
    failure: str | None


class FlakyProxy:
    """Made by `flaky_proxy`.

    Attributes:
        rate: fraction of the requests that fail; 0 at first.
        seen: every request that was answered, or failed on purpose.
        full: set when `stop_after` holds a request.
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
        """Fail this fraction of the requests from now on."""
        self.rate = rate

    @contextmanager
    def gone(self) -> Iterator[None]:
        """Fail everything for the time of a `with` block. Clients give up after a second instead of minutes."""
        from cache_tools.home import staging
        from cache_tools.storage import remote

        with pytest.MonkeyPatch.context() as patch:
            for module in (remote, staging):
                patch.setattr(module, "PATIENCE_S", 1.0)
            before, self.rate = self.rate, 1.0
            yield
            self.rate = before

    def stop_after(self, requests: int) -> None:
        """Answer this many more requests, then hold all others until `go_on`; the first one held sets `full`."""
        with self._lock:
            self._left = requests
            self.full.clear()
            self._open.clear()

    def go_on(self) -> None:
        """Answer again. Requests that waited fail: their clients may be gone."""
        with self._lock:
            self._left = None
            self._open.set()

    def reached(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until a condition on `seen` holds."""
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)

    def forget(self) -> None:
        """Clear `seen`."""
        with self._lock:
            self.seen.clear()

    def paths(self, method: str) -> list[str]:
        """Paths of the answered requests with this method, in order."""
        return [request.path for request in self.seen if request.method == method and request.failure is None]

    def gate(self) -> bool:
        """Hold a request after `stop_after`; returns whether it may pass."""
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
        """How the next request fails; None if it does not."""
        with self._lock:
            return self._random.choice(FAILURES) if self._random.random() < self.rate else None

    def note(self, seen: Seen) -> None:
        """Record a request."""
        with self._changed:
            self.seen.append(seen)
            self._changed.notify_all()


@contextmanager
def flaky_proxy(seed: int = 0) -> Iterator[FlakyProxy]:
    """Run a proxy in front of the S3 server that the environment points to, and point the environment to the proxy."""
    proxy = FlakyProxy(os.environ["AWS_ENDPOINT_URL"], seed)
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
        """Say nothing about clients that went away: tests kill them."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version, proxy = "HTTP/1.1", FlakyProxy("http://127.0.0.1:9", 0)

    def setup(self) -> None:
        super().setup()
        self._connection = http.client.HTTPConnection(self.proxy.upstream.hostname or "", self.proxy.upstream.port)

    def finish(self) -> None:
        self._connection.close()
        super().finish()

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
        """The answer of the server, over one connection for all requests of a client's connection."""
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        self._connection.request(self.command, self.path, body=body or None, headers=headers)
        response = self._connection.getresponse()
        return response.status, response.reason, response.getheaders(), response.read()

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
        """Print nothing."""
