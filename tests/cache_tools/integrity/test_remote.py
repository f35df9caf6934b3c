"""`verify` and `repair` of a cache in an object store, in place."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cache_tools.cli import app
from cache_tools.errors import FormatError, NotFoundError, StorageError
from cache_tools.integrity import local as integrity
from cache_tools.integrity.remote import repair, verify
from cache_tools.places import LocalPlace, Place, open_place
from cache_tools.places.transfer import copy_cache, list_committed
from cache_tools.storage import remote
from tests.support.cache_factory import build, tiny_images, tiny_manifest
from tests.support.flaky_proxy import FlakyProxy, flaky_proxy
from tests.support.s3_server import new_bucket, upload
from tests.support.turns import slow

IMAGES = tiny_images()
MANIFEST = tiny_manifest(IMAGES)
BLOCKS = MANIFEST.num_views * MANIFEST.num_blocks


@pytest.fixture
def proxy(server: str) -> Iterator[FlakyProxy]:
    with flaky_proxy(seed=2) as proxy:
        yield proxy


@pytest.fixture
def cache(tmp_path: Path) -> LocalPlace:
    build(tmp_path / "cache.zarr", MANIFEST, IMAGES)
    return LocalPlace(tmp_path / "cache.zarr")


@pytest.fixture
def place(proxy: FlakyProxy, cache: LocalPlace) -> Place:
    """The same cache in an object store."""
    url = f"s3://{new_bucket()}/group/cache.zarr"
    upload(cache.path, url)
    place = open_place(url)
    proxy.forget()
    return place


def flip(place: Place, key: str) -> None:
    data = bytearray(place.read(key))
    data[len(data) // 2] ^= 8
    place.put(key, bytes(data))


def test_a_sound_remote_cache_verifies_like_a_local_one(proxy: FlakyProxy, place: Place, cache: LocalPlace) -> None:
    found, local = verify(place), integrity.verify(cache.path)
    assert found.sound
    assert found.path == str(place)
    assert (found.blocks, found.bytes, found.fingerprint) == (local.blocks, local.bytes, local.fingerprint)
    reads = proxy.paths("GET")
    assert all(any(path.endswith(f"/{entry.key}") for path in reads) for entry in cache.entries()), "every file"
    assert {seen.method for seen in proxy.seen} == {"GET"}


@pytest.mark.parametrize(
    "key",
    [
        "fused_logits/c.1.2.0",
        "commits/c.0.1.0",
        "labels/c.0",
        slow("class_embeddings/c.0.0"),
        "fused_features/zarr.json",
    ],
)
def test_remote_damage_is_reported_like_local_damage(place: Place, cache: LocalPlace, key: str) -> None:
    for each in (place, cache):
        flip(each, key)
    found, local = verify(place), integrity.verify(cache.path)
    assert not found.sound
    assert [(p.what, p.cure, p.view, p.block) for p in found.problems] == [
        (p.what, p.cure, p.view, p.block) for p in local.problems
    ]
    assert [p.where.removeprefix(str(place)) for p in found.problems] == [
        p.where.removeprefix(str(cache)) for p in local.problems
    ]


def test_a_missing_chunk_is_found(place: Place) -> None:
    place.delete(["fused_logits/c.2.0.0"])
    (problem,) = verify(place).problems
    assert (problem.view, problem.block, problem.cure) == (2, 0, "block")


def test_a_repaired_remote_cache_is_restored_by_a_push(place: Place, cache: LocalPlace) -> None:
    flip(place, "fused_logits/c.1.2.0")
    flip(place, "fused_features/zarr.json")
    result = CliRunner().invoke(app, ["verify", str(place)])
    assert result.exit_code == 1
    assert f"{place}/fused_logits view 1, block 2: " in result.stdout
    assert "would drop 1 blocks and rewrite 1 metadata" in CliRunner().invoke(app, ["repair", str(place)]).stdout
    assert len(list_committed(place)) == BLOCKS, "nothing was done without --yes"
    done = CliRunner().invoke(app, ["repair", str(place), "--yes"]).stdout
    assert "dropped view 1, block 2" in done
    assert "Run this command again: arrays" in done
    assert "Push a sound copy of the cache" in done
    assert list_committed(place) == {(v, b) for v in range(3) for b in range(5)} - {(1, 2)}
    assert copy_cache(cache, place).blocks == 1
    assert verify(place).sound
    assert {entry.key: place.read(entry.key) for entry in place.entries()}.keys() == {e.key for e in cache.entries()}


def test_a_store_that_fails_is_not_a_damaged_cache(proxy: FlakyProxy, place: Place) -> None:
    proxy.fail(0.2)
    assert verify(place).sound
    assert repair(place, verify(place)).dropped == ()
    with proxy.gone(), pytest.raises(StorageError, match="does not answer as it should"):
        verify(open_place(str(place)))


@pytest.mark.parametrize("requests", [slow(1), 14, slow(40)])
def test_losing_the_store_during_verify_is_one_error(
    proxy: FlakyProxy, place: Place, monkeypatch: pytest.MonkeyPatch, requests: int
) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 5.0)
    monkeypatch.setattr(proxy, "choose", lambda: "503" if len(proxy.seen) >= requests else None)
    with pytest.raises(StorageError, match="does not answer as it should"):
        verify(open_place(str(place)))


def test_verifying_something_else_than_a_cache_is_a_clear_error(place: Place) -> None:
    with pytest.raises(NotFoundError, match="no cache here"):
        verify(place.sibling("nothing"))
    flip(place, "zarr.json")
    with pytest.raises(FormatError):
        verify(place)
