"""moto's S3 server on 127.0.0.1, and buckets on it."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment


@contextmanager
def s3_server(address: str = "127.0.0.1", port: int = 0) -> Iterator[dict[str, str]]:
    """Run a server; yields the environment variables that point a client to it."""
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    if not has_loopback():
        pytest.skip("needs the loopback interface")
    from moto.moto_server.werkzeug_app import create_backend_app
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # pytest would format and keep a line for each request
    server = ThreadedMotoServer(ip_address=address, port=port, verbose=False)
    server.start()
    assert server._server is not None
    server._server.app = _AtomicCreation(_SignedForS3(create_backend_app("s3"), server._server.app))
    host, port = server.get_host_and_port()
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }
    finally:
        server.stop()


@contextmanager
def s3_server_elsewhere() -> Iterator[dict[str, str]]:
    """`s3_server` in a process of its own, for a process that must stay without threads."""
    words = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield json.loads(server.stdout.readline())
        finally:
            server.stdin.close()  # the server then ends


def serve() -> None:
    """Print the variables of a server as JSON, and run it until standard input ends."""
    with s3_server() as variables:
        print(json.dumps(variables), flush=True)
        sys.stdin.read()


class _SignedForS3:
    """Gives requests that are signed for S3 to S3 at once, and all others to moto's dispatcher.

    The dispatcher looks for the service of each request in 170 folders, which takes as long as the request itself.
    """

    def __init__(self, s3: WSGIApplication, dispatcher: WSGIApplication) -> None:
        self._s3, self._dispatcher = s3, dispatcher

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        is_for_s3 = "/s3/aws4_request" in environ.get("HTTP_AUTHORIZATION", "")
        return (self._s3 if is_for_s3 else self._dispatcher)(environ, start_response)


class _AtomicCreation:
    """Lets one request at a time create an object that must not exist yet.

    Object stores decide this atomically. moto checks first and stores then, and two of its threads may both succeed.
    """

    def __init__(self, app: WSGIApplication) -> None:
        self._app, self._lock = app, threading.Lock()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" not in environ or environ["REQUEST_METHOD"] != "PUT":
            return self._app(environ, start_response)
        with self._lock:
            return self._app(environ, start_response)


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the time of a `with` block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def upload(folder: Path, url: str) -> None:
    """Put the files of a folder below a URL, into the memory of the server of this process, without requests."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    for file in folder.rglob("*"):
        if file.is_file():
            backend.put_object(bucket, f"{prefix}/{file.relative_to(folder).as_posix()}", file.read_bytes())


def has_loopback() -> bool:
    """Whether a server on 127.0.0.1 can be reached."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            socket.create_connection(listening.getsockname(), timeout=5).close()
    except OSError:
        return False
    return True


def new_bucket(name: str | None = None) -> str:
    """Make an empty bucket on the server that the environment points to; returns its name, by default a new one."""
    bucket = name or f"caches-{uuid.uuid4().hex[:12]}"
    request = urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}", method="PUT")
    urllib.request.urlopen(request).close()
    return bucket
