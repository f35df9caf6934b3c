"""A stranger's server on 127.0.0.1 that logs every connection, and a log of what Python tries to reach elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Stranger:
    """The server.

    Attributes:
        url: of it, without a slash at the end.
        log: a line for each connection, and for each request; also attempts of Python to reach another host.
    """

    def __init__(self, url: str) -> None:
        self.url, self.log = url, []  # type: tuple[str, list[str]]


@contextmanager
def strangers_server() -> Iterator[Stranger]:
    """Run the server. It answers everything with 404."""
    log: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def setup(self) -> None:
            log.append(f"connection from {self.client_address}")
            super().setup()

        def answer(self) -> None:
            log.append(f"{self.command} {self.path} {dict(self.headers)}")
            self.send_error(404)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        stranger = Stranger(f"http://127.0.0.1:{server.server_address[1]}")
        stranger.log = log
        with _watched(log):
            yield stranger
        server.shutdown()


_logs: list[list[str]] = []


@contextmanager
def _watched(log: list[str]) -> Iterator[None]:
    """Log look-ups of hosts and requests of Python's own, which may be to any host. Native clients reach the server."""
    if not _watched.__dict__.setdefault("hook", False):
        sys.addaudithook(_hook)
        _watched.__dict__["hook"] = True
    _logs.append(log)
    try:
        yield
    finally:
        _logs.remove(log)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event in {"socket.getaddrinfo", "urllib.Request"} and _logs and arguments[0] not in {None, "localhost"}:
        for log in _logs:
            log.append(f"{event} {arguments[0]}")
