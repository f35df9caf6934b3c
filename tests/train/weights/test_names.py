"""Weights of a hub: local copies first, then the network, then one clear error. The hub is a server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.support.s3_server import has_loopback
from train.weights.names import load_local_first

CONTENT = b"weights"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

pytestmark = pytest.mark.skipif(not has_loopback(), reason="needs the loopback interface")


@pytest.fixture(autouse=True)
def online_without_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits between its attempts


class Hub(BaseHTTPRequestHandler):
    """A hub with one file; `requests` are the methods that it has answered."""

    requests: list[str]

    def do_HEAD(self) -> None:
        self.requests.append(self.command)
        self.send_response(200)
        for name, value in {"ETag": '"1"', "X-Repo-Commit": COMMIT, "Content-Length": len(CONTENT)}.items():
            self.send_header(name, str(value))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(CONTENT)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def running_hub() -> Iterator[tuple[str, list[str]]]:
    """Address of a running hub, and the requests that it has answered."""
    requests: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("CountingHub", (Hub,), {"requests": requests}))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def download(endpoint: str, cache: Path) -> bytes:
    path = load_local_first(lambda: hf_hub_download("org/model", "weights.bin", endpoint=endpoint, cache_dir=cache))
    return Path(path).read_bytes()


def test_a_missing_file_is_downloaded_once_and_then_found_without_a_request(tmp_path: Path) -> None:
    with running_hub() as (endpoint, requests):
        assert download(endpoint, tmp_path) == CONTENT
        assert "GET" in requests
        requests.clear()
        assert download(endpoint, tmp_path) == CONTENT
        assert requests == []
    assert download(endpoint, tmp_path) == CONTENT, "the hub is out of reach now"
    assert not constants.HF_HUB_OFFLINE


def test_a_missing_file_and_no_hub_raise_the_error_of_the_hub(tmp_path: Path) -> None:
    with running_hub() as (endpoint, _):
        pass
    with pytest.raises(LocalEntryNotFoundError, match="cannot find the requested files in the local cache"):
        download(endpoint, tmp_path)
    assert not constants.HF_HUB_OFFLINE


def test_offline_mode_of_the_user_is_respected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with running_hub() as (endpoint, requests):
        with pytest.raises(LocalEntryNotFoundError):
            download(endpoint, tmp_path)
        assert requests == []
    assert constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("offline", [True, False])
def test_an_error_of_the_load_is_raised_and_the_mode_restored(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    modes = []

    def load() -> None:
        modes.append(constants.HF_HUB_OFFLINE)
        raise OSError("weights do not fit")

    with pytest.raises(OSError, match="do not fit"):
        load_local_first(load)
    assert modes == ([True] if offline else [True, False])
    assert constants.HF_HUB_OFFLINE is offline
