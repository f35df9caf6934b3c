"""A store that fails a fifth of its requests, and killed clients: commits are right, and copies can be continued."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from cache_tools.errors import StorageError
from cache_tools.format.commits import BlockId
from cache_tools.integrity.local import verify
from cache_tools.places import LocalPlace, Place, RemotePlace, open_place
from cache_tools.places.claims import Claims
from cache_tools.places.transfer import copy_cache, list_committed
from tests.support.cache_factory import build, tiny_images, tiny_manifest
from tests.support.flaky_proxy import FAILURES, FlakyProxy, flaky_proxy
from tests.support.s3_server import new_bucket
from tests.support.turns import slow

IMAGES = tiny_images()
MANIFEST = tiny_manifest(IMAGES)
BLOCKS = MANIFEST.num_views * MANIFEST.num_blocks
Answer = TypeVar("Answer")


@pytest.fixture
def proxy(server: str) -> Iterator[FlakyProxy]:
    """A proxy that fails nothing yet, in front of the S3 server."""
    with flaky_proxy(seed=3) as proxy:
        yield proxy


@pytest.fixture
def place(proxy: FlakyProxy) -> Place:
    bucket = new_bucket()
    proxy.forget()
    return open_place(f"s3://{bucket}/group/cache.zarr")


@pytest.fixture
def cache(tmp_path: Path) -> LocalPlace:
    build(tmp_path / "cache.zarr", MANIFEST, IMAGES)
    return LocalPlace(tmp_path / "cache.zarr")


def files(place: Place) -> dict[str, bytes]:
    return {entry.key: place.read(entry.key) for entry in place.entries()}


def test_failed_requests_are_repeated(proxy: FlakyProxy, place: Place) -> None:
    proxy.fail(0.2)
    for number in range(12):
        place.put(f"put/{number}", bytes([number]) * 5000)
        assert place.put(f"new/{number}", b"mine", only_new=True), "ours, even if the answer got lost"
        assert not place.put(f"new/{number}", b"another's", only_new=True)
        assert place.read(f"put/{number}") == bytes([number]) * 5000
        assert place.folders() == ["new", "put"]
        with pytest.raises(FileNotFoundError):
            place.read(f"absent/{number}")
    for _ in range(10):
        assert len(list(place.entries())) == 24
    place.delete([entry.key for entry in place.entries()])
    proxy.fail(0.0)
    assert list(place.entries()) == []
    assert {seen.failure for seen in proxy.seen} == {*FAILURES, None}, "each kind was met"


def test_a_claim_is_held_even_if_the_answer_is_lost(proxy: FlakyProxy, place: Place) -> None:
    proxy.fail(0.2)
    blocks = [BlockId(0, block) for block in range(6)]
    with Claims(place) as claims:
        assert [claims.claim(block) for block in blocks] == [True] * 6
        with Claims(place) as other:
            assert not any(other.claim(block) for block in blocks)
        for block in blocks:
            claims.release(block)


def test_push_and_pull_while_a_fifth_of_the_requests_fail(
    proxy: FlakyProxy, place: Place, cache: LocalPlace, tmp_path: Path
) -> None:
    proxy.fail(0.2)
    assert copy_cache(cache, place).blocks == BLOCKS
    back = LocalPlace(tmp_path / "back.zarr")
    assert copy_cache(place, back).blocks == BLOCKS
    failed = sum(seen.failure is not None for seen in proxy.seen)
    assert failed > 0.1 * len(proxy.seen)
    assert files(back) == files(cache)
    proxy.fail(0.0)
    assert files(place) == files(cache)


def test_a_store_that_always_fails_is_one_clear_error(proxy: FlakyProxy, place: Place, cache: LocalPlace) -> None:
    copy_cache(cache, place, views=[0])
    proxy.fail(1.0)
    impatient = RemotePlace(str(place), patience_s=1.0)
    with pytest.raises(StorageError, match=r"does not answer as it should.*the same command: it continues") as caught:
        copy_cache(cache, impatient)
    assert "\n" not in str(caught.value)
    proxy.fail(0.0)
    assert list_committed(place) == {(0, block) for block in range(MANIFEST.num_blocks)}
    assert copy_cache(cache, place).blocks_there == MANIFEST.num_blocks


def settled(read: Callable[[], Answer]) -> Answer:
    """What is read once it no longer changes: the proxy still forwards requests of the killed process."""
    found = read()
    while True:
        time.sleep(0.3)
        before, found = found, read()
        if found == before:
            return found


@pytest.mark.parametrize(("direction", "requests"), [slow("push", 17), ("push", 47), ("pull", 4), slow("pull", 30)])
def test_a_killed_copy_can_be_continued(
    proxy: FlakyProxy, place: Place, cache: LocalPlace, tmp_path: Path, direction: str, requests: int
) -> None:
    """SIGKILL after some requests; the rerun copies only what is missing, and no file is damaged."""
    back = LocalPlace(tmp_path / "back.zarr")
    if direction == "pull":
        copy_cache(cache, place)
    source, target = (cache, place) if direction == "push" else (place, back)
    proxy.stop_after(requests)
    process = subprocess.Popen([sys.executable, "-m", "cache_tools.cli", "copy", str(source), str(target)])
    assert proxy.full.wait(300)
    process.kill()
    process.wait()
    proxy.go_on()
    committed = settled(lambda: list_committed(target))
    assert len(committed) < BLOCKS
    for key, data in files(target).items():  # every file is whole or missing
        assert data == cache.read(key)
    proxy.forget()
    moved = copy_cache(source, target)
    assert (moved.blocks, moved.blocks_there) == (BLOCKS - len(committed), len(committed))
    assert files(target) == files(cache)
    in_cache = [seen for seen in proxy.seen if "/cache.zarr/" in seen.path]  # without the claims beside it
    carried = sum(seen.sent if direction == "push" else seen.received for seen in in_cache)
    if direction == "push":
        assert carried == moved.bytes
    again = proxy.paths("PUT" if direction == "push" else "GET")
    assert not [path for view, block in committed for path in again if path.endswith(f"/commits/c.{view}.{block}.0")]
    if direction == "pull":
        assert verify(back.path).sound


def test_the_proxy_counts_requests(proxy: FlakyProxy, place: Place) -> None:
    place.put("a", bytes(1000))
    place.read("a")
    assert [(seen.method, seen.sent, seen.received) for seen in proxy.seen] == [("PUT", 1000, 0), ("GET", 0, 1000)]
    assert os.environ["AWS_ENDPOINT_URL"] != proxy.upstream.geturl()
