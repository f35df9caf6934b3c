"""Several processes build one cache at once: each block once, the bytes of a single build, no leftovers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cache_tools.alignment import check_canaries
from cache_tools.console import Progress
from cache_tools.errors import DataError, StorageError
from cache_tools.files import PARTIAL
from cache_tools.format.commits import BlockId
from cache_tools.images import open_images
from cache_tools.integrity.local import verify
from cache_tools.places import LocalPlace, Place, open_place
from cache_tools.places.claims import Claims, claims_place
from cache_tools.places.transfer import copy_cache, list_committed
from cache_tools.reader import TeacherCache
from cache_tools.store.writer import CacheWriter
from pipeline.build.blocks import _store
from pipeline.build.cache import build_cache
from pipeline.build.output import Output
from tests.support import tiny_build
from tests.support.builders import Builder, wait_for_blocks
from tests.support.s3_server import new_bucket
from tests.support.tiny_build import arrays_of
from tests.support.turns import slow

pytestmark = pytest.mark.medium

SAMPLES, VIEWS, ROWS = 100, 4, 20
BLOCKS = VIEWS * -(-SAMPLES // ROWS)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tiny_build.prepare(tmp_path_factory.mktemp("builders"), train=SAMPLES)


@pytest.fixture(scope="module")
def clean(root: Path) -> dict[str, bytes]:
    """The arrays of an uninterrupted build by one builder."""
    build_cache(tiny_build.recipe(root, num_views=VIEWS, block_rows=ROWS, out=root / "clean.zarr"))
    return arrays_of(root / "clean.zarr")


# A few processes each: `make test` shares the two kinds of places among these tests.
ON_S3 = pytest.mark.parametrize("out", [slow("folder"), "s3"], indirect=True)
IN_A_FOLDER = pytest.mark.parametrize("out", ["folder", slow("s3")], indirect=True)


@pytest.fixture
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    if request.param == "folder":
        return tmp_path / "cache.zarr"
    request.getfixturevalue("server")
    return f"s3://{new_bucket()}/group/cache.zarr"


def start(
    root: Path, tmp_path: Path, out: Path | str, number: int, pause_after: int | None = None, **changes: object
) -> Builder:
    """A builder with its own cache home, as on another machine."""
    recipe = tiny_build.recipe(root, **({"num_views": VIEWS, "block_rows": ROWS, "out": out} | changes))
    return Builder(recipe, pause_after, TEACHER_CACHE_HOME=tmp_path / f"home-{number}")


@ON_S3
@pytest.mark.parametrize("builders", [2, slow(4)])
def test_builders_share_the_work(root: Path, clean: dict[str, bytes], tmp_path: Path, out: Path | str, builders: int):
    running = [start(root, tmp_path, out, number, pause_after=1) for number in range(2)]
    for builder in running:
        builder.wait_until_paused()  # neither can finish before the other begins
    running += [start(root, tmp_path, out, number) for number in range(2, builders)]
    for builder in running:
        builder.go_on()
    results = [builder.result() for builder in running]
    assert sum(result.images for result in results) == VIEWS * SAMPLES, "a block was computed twice, or not at all"
    assert all(result.images > 0 for result in results[:2])
    check(open_place(out), clean, tmp_path)


@ON_S3
def test_builders_share_the_codebooks_of_one_of_them(root: Path, tmp_path: Path, out: Path | str) -> None:
    """Both may fit codecs before one creates the cache. The other then encodes with what is stored."""
    codec = {"logits": {"codec": "product", "parts": 1, "width": 2}}
    whole = tmp_path / "whole.zarr"
    build_cache(tiny_build.recipe(root, num_views=VIEWS, block_rows=ROWS, out=whole, codec=codec))
    running = [start(root, tmp_path, out, number, pause_after=1, codec=codec) for number in range(2)]
    for builder in running:
        builder.wait_until_paused()
    for builder in running:
        builder.go_on()
    assert sum(builder.result().images for builder in running) == VIEWS * SAMPLES
    check(open_place(out), arrays_of(whole), tmp_path)


@IN_A_FOLDER
def test_blocks_of_killed_builders_are_taken_over(root: Path, clean: dict[str, bytes], tmp_path: Path, out: Path | str):
    """One builder is killed alone, then one of three. No builder waits for claims to expire or repeats a block."""
    place, first = open_place(out), start(root, tmp_path, out, 0, pause_after=6)
    first.wait_until_paused()
    wait_for_blocks(place, 6)
    first.kill()
    before = list_committed(place)
    assert len(before) == 6
    running = [start(root, tmp_path, out, number) for number in (1, 2, 0)]
    wait_for_blocks(place, len(before) + 3)
    running[0].kill()
    left = sum(rows(block) for block in all_blocks() - list_committed(place))
    images = sum(builder.result().images for builder in running[1:])
    assert left <= images <= VIEWS * SAMPLES - sum(map(rows, before))
    check(place, clean, tmp_path)


@ON_S3
def test_several_builders_create_and_grow_one_cache(root: Path, tmp_path: Path, out: Path | str):
    """Builders of 2, 4 and 3 views at once: the cache ends with 4."""
    running = [start(root, tmp_path, out, views, num_views=views) for views in (2, 4, 3)]
    for builder in running:
        builder.result()
    copy_cache(open_place(out), LocalPlace(tmp_path / "copy.zarr"))
    cache = TeacherCache.open(tmp_path / "copy.zarr")
    cache.require_complete()
    assert cache.num_views == 4
    images = open_images(cache.manifest.dataset)
    check_canaries(cache, images)
    assert {canary.view for canary in cache.manifest.canaries} == {0, 1, 2, 3}
    assert not list(claims_place(open_place(out)).entries())


def test_growing_records_provenance_and_adds_canaries(root: Path, tmp_path: Path):
    build_cache(tiny_build.recipe(root, num_views=1, out=tmp_path / "c"))
    first = TeacherCache.open(tmp_path / "c").manifest
    build_cache(tiny_build.recipe(root, num_views=3, out=tmp_path / "c"))
    manifest = TeacherCache.open(tmp_path / "c").manifest
    (note,) = manifest.provenance["grown"]
    assert note["views"] == [1, 3]
    assert {"date", "command", "device", "versions"} <= set(note)
    assert manifest.canaries[: len(first.canaries)] == first.canaries
    added = manifest.canaries[len(first.canaries) :]
    assert {canary.view for canary in added} == {1, 2}
    assert {name: manifest.provenance[name] for name in first.provenance} == first.provenance


def test_progress_includes_blocks_of_other_builders(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bars: list[Progress] = []

    class Seen(Progress):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            bars.append(self)

        def advance(self, *arguments: Any) -> None:
            super().advance(*arguments)
            other.go_on()

    monkeypatch.setattr("pipeline.build.blocks.Progress", Seen)
    other = start(root, tmp_path, tmp_path / "c", 1, pause_after=1)
    other.wait_until_paused()
    result = build_cache(tiny_build.recipe(root, num_views=VIEWS, block_rows=ROWS, out=tmp_path / "c"))
    (bar,) = bars
    assert 0 < result.images < VIEWS * SAMPLES
    assert result.images + other.result().images == VIEWS * SAMPLES
    assert bar.done == bar.total == VIEWS * SAMPLES


def test_a_failing_builder_releases_its_claims(tmp_path: Path):
    root = tiny_build.prepare(tmp_path, train=60)
    victim = sorted((root / "pictures" / "train" / "red").iterdir())[-1]
    data = victim.read_bytes()
    victim.write_bytes(data[:60])
    recipe = tiny_build.recipe(root, block_rows=16, batch_size=16)
    with pytest.raises(DataError, match=victim.name):
        build_cache(recipe)
    assert not (tmp_path / ".cache.zarr.claims").exists()


def test_a_builder_with_a_full_disk_releases_its_claims(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, whole = tmp_path / "c", CacheWriter.write_block

    def full(self: CacheWriter, view: int, block: int, *arguments: object) -> None:
        if (view, block) == (1, 1):
            raise StorageError("full", where=self.path)
        whole(self, view, block, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CacheWriter, "write_block", full)
    with pytest.raises(StorageError, match="full"):
        build_cache(tiny_build.recipe(root, out=path))
    assert not (tmp_path / ".c.claims").exists()
    monkeypatch.undo()
    build_cache(tiny_build.recipe(root, out=path))
    TeacherCache.open(path).require_complete()


def test_a_block_that_another_builder_took_over_is_not_written(root: Path, tmp_path: Path):
    build_cache(tiny_build.recipe(root, out=tmp_path / "c"))
    manifest = TeacherCache.open(tmp_path / "c").manifest
    (tmp_path / "c" / "commits" / "c.1.1.0").unlink()
    output = Output(CacheWriter.resume(tmp_path / "c", manifest.fingerprint))
    count = manifest.block(1).stop - manifest.block(1).start
    arrays = {"fused_logits": torch.zeros(count, 3), "fused_features": torch.zeros(count, 16)}
    before = arrays_of(tmp_path / "c")
    with Claims(output.place) as claims:
        assert claims.claim(BlockId(1, 1))
        claims_place(output.place).put("1.1.1", b"of the builder that took it over")
        assert _store(output, claims, BlockId(1, 1), arrays, None) == 0
        assert arrays_of(tmp_path / "c") == before
        claims_place(output.place).delete(["1.1.1"])
        assert claims.claim(BlockId(1, 1))
        assert _store(output, claims, BlockId(1, 1), arrays, None) == count
    assert output.is_committed(BlockId(1, 1))


def check(place: Place, clean: dict[str, bytes], tmp_path: Path) -> None:
    """Check that the cache is sound, has the bytes of a single build, and that nothing lies beside it."""
    copy_cache(place, LocalPlace(tmp_path / "copy.zarr"))
    assert verify(tmp_path / "copy.zarr").sound
    found = arrays_of(tmp_path / "copy.zarr")
    assert found.keys() == clean.keys()
    assert [name for name in clean if found[name] != clean[name]] == []
    assert not list(claims_place(place).entries())
    if isinstance(place, LocalPlace):
        hidden = [path for path in place.path.parent.iterdir() if path.name.startswith(".")]
        # A partial claim of a builder that was killed while it wrote is removed by a later builder.
        assert [file for path in hidden for file in path.rglob("*") if not file.name.endswith(PARTIAL)] == []
        assert [path.name for path in hidden if path.name != claims_place(place).name] == []


def all_blocks() -> set[BlockId]:
    return {BlockId(view, block) for view in range(VIEWS) for block in range(BLOCKS // VIEWS)}


def rows(block: BlockId) -> int:
    return min(ROWS, SAMPLES - block.block * ROWS)
