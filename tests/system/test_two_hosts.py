"""Two hosts that share no disk build one cache in the object store of a third; the bytes that each of them moved."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from cache_tools.config import dump_yaml
from pipeline.build.cache import build_cache
from tests.support import tiny_build
from tests.support.hosts import Host, end, hosts, store_on
from tests.support.tiny_build import arrays_of

pytestmark = pytest.mark.slow
SAMPLES, VIEWS, ROWS = 150, 6, 16
BLOCKS = VIEWS * -(-SAMPLES // ROWS)
PATIENCE_S = 400.0
BUILD = [sys.executable, "-m", "pipeline.cli"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_build.prepare(tmp_path_factory.mktemp("hosts"))


def mirrored(host: Host) -> int:
    """Number of blocks that a host has computed."""
    return len(list(host.home.glob("tiny-*.zarr/commits/c.*")))


@pytest.mark.parametrize("is_lost", [False, True])
def test_two_hosts_build_one_cache(root: Path, tmp_path: Path, is_lost: bool) -> None:
    """One host may be lost half-way: its claims expire after a minute, and the other one completes the cache."""
    with hosts(3, tmp_path) as (first, second, third), store_on(third) as variables:
        url = f"s3://{variables.pop('BUCKET')}/caches/tiny.zarr"
        recipe = tiny_build.recipe(root, num_views=VIEWS, block_rows=ROWS, out=url)
        (tmp_path / "tiny.yaml").write_text(dump_yaml(recipe))
        before = {host.name: host.moved() for host in (first, second)}
        builders = {
            host: host.start([*BUILD, tmp_path / "tiny.yaml", "--json"], **variables) for host in (first, second)
        }
        try:
            if is_lost:
                end_s = time.monotonic() + PATIENCE_S
                while min(mirrored(first), mirrored(second)) < 3:
                    assert time.monotonic() < end_s
                    assert builders[first].poll() is builders[second].poll() is None
                    time.sleep(0.02)
                end(builders[second])
            alive = [first] if is_lost else [first, second]
            results = []
            for host in alive:
                out, err = builders[host].communicate(timeout=PATIENCE_S)
                assert builders[host].returncode == 0, err
                results.append(json.loads(out))
            moved = {
                host: [now - then for now, then in zip(host.moved(), before[host.name], strict=True)]
                for host in (first, second)
            }
            shares = [mirrored(host) for host in (first, second)]
            copy = third.start(
                [sys.executable, "-m", "cache_tools.cli", "copy", url, tmp_path / "copy.zarr"], **variables
            )
            _, err = copy.communicate(timeout=PATIENCE_S)
            assert copy.returncode == 0, err
        finally:
            for builder in builders.values():
                end(builder)
    build_cache(recipe.model_copy(update={"out": tmp_path / "alone.zarr"}))
    assert arrays_of(tmp_path / "copy.zarr") == arrays_of(tmp_path / "alone.zarr")
    size = sum(map(len, arrays_of(tmp_path / "copy.zarr").values()))
    report = {
        host.address: {"blocks": share, "received": moved[host][0], "sent": moved[host][1]}
        for host, share in zip((first, second), shares, strict=True)
    }
    print(json.dumps({"bytes_of_arrays": size, "hosts": report}))
    assert min(shares) > 0
    if is_lost:
        assert BLOCKS <= sum(shares) <= BLOCKS + 8, "blocks that the lost host had not uploaded are computed again"
        return
    assert sum(shares) == BLOCKS
    assert sum(result["images_computed"] for result in results) == VIEWS * SAMPLES
    for result, host, share in zip(results, (first, second), shares, strict=True):
        assert moved[host][1] > size * share / BLOCKS, "it sends what it computes"
        assert moved[host][1] > 0.9 * result["bytes_moved"] * share / BLOCKS
