"""A real S3 server on 127.0.0.1, for tests: moto's, with a bucket per test."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def s3_server() -> Iterator[str]:
    """Start a server; gives its endpoint, which the environment of this process then points to."""
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    if not loopback():
        pytest.skip("needs the loopback interface")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield settings["AWS_ENDPOINT_URL"]
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        server.stop()


def loopback() -> bool:
    """Whether a server on 127.0.0.1 can be reached."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            socket.create_connection(listening.getsockname(), timeout=5).close()
    except OSError:
        return False
    return True


def new_bucket() -> str:
    """A fresh, empty bucket on the server that the environment points to."""
    import urllib.request

    bucket = f"caches-{uuid.uuid4().hex[:12]}"
    request = urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}", method="PUT")
    urllib.request.urlopen(request).close()
    return bucket
