"""Places of one process share obstore's stores, as long as nothing that a store depends on differs."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cache_tools.errors import StorageError
from cache_tools.storage import RemotePlace
from tests.support.s3_server import new_bucket

pytest.importorskip("obstore")

VARIABLES = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
URL = "s3://bucket/caches"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keys in the environment, and no files of AWS settings."""
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CREDENTIALS", "CONFIG"):
        variable = "AWS_SHARED_CREDENTIALS_FILE" if name == "CREDENTIALS" else "AWS_CONFIG_FILE"
        monkeypatch.setenv(variable, str(tmp_path / name))
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("alone")
def test_places_of_one_url_share_a_store() -> None:
    place = RemotePlace(URL)
    assert RemotePlace(f"{URL}/")._store is place._store
    assert place.child("one").sibling("two")._store is RemotePlace(f"{URL}/two")._store
    assert place.child("one")._store is not place._store
    assert RemotePlace(URL, patience_s=1.0)._store is not place._store


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "variable", ["AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_SESSION_TOKEN", "HTTPS_PROXY"]
)
def test_another_environment_is_another_store(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    place = RemotePlace(URL)
    monkeypatch.setenv(variable, "http://127.0.0.1:2")
    assert RemotePlace(URL)._store is not place._store


@pytest.mark.usefixtures("alone")
def test_keys_of_a_profile_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")

    def place(secret: str) -> RemotePlace:
        text = f"[default]\naws_access_key_id = a\naws_secret_access_key = {secret}\n"
        (tmp_path / "CREDENTIALS").write_text(text)
        return RemotePlace(URL)

    first = place("b")
    assert place("b")._store is first._store
    assert place("c")._store is not first._store
    assert "'b'" not in repr(first._settings)


def test_threads_use_one_store_at_the_same_time(server: str) -> None:
    url = f"s3://{new_bucket()}/caches"

    def copy(number: int) -> bytes:
        place = RemotePlace(url)
        place.put(str(number), bytes([number]) * 1000)
        return place.read(str(number))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy, range(40))) == [bytes([number]) * 1000 for number in range(40)]
    assert RemotePlace(url)._store is RemotePlace(url)._store


def test_what_has_answered_once_is_given_time_from_then_on(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place opened later is as patient as the one that was answered; another bucket or endpoint is not."""
    bucket = new_bucket()
    RemotePlace(f"s3://{bucket}/caches").put("a", b"1")
    assert RemotePlace(f"s3://{bucket}/others")._is_patient
    assert not RemotePlace(f"s3://{new_bucket()}/caches")._is_patient
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    elsewhere, start = RemotePlace(f"s3://{bucket}/caches"), time.monotonic()
    with pytest.raises(StorageError, match="connection refused"):
        elsewhere.read("a")
    assert time.monotonic() - start < 10


FORK = f"""
import os
from cache_tools.storage import RemotePlace

place = RemotePlace({URL!r})
assert RemotePlace({URL!r})._store is place._store
child = os.fork()
if child == 0:
    os._exit(3 if RemotePlace({URL!r})._store is not place._store else 4)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.usefixtures("alone")
def test_a_forked_process_makes_its_own_stores() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("3\n", 0), done.stderr
