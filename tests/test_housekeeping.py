import os
import time
from pathlib import Path

import pytest
from cache_factory import build, create, tiny_images, tiny_manifest

from cache_tools import housekeeping, registry
from cache_tools.claims import Claims
from cache_tools.errors import RecipeError, StorageError
from cache_tools.housekeeping import PruneRules
from cache_tools.place import LocalPlace

IMAGES = tiny_images()
DAY = 86_400.0
NOW = 1_000_000_000.0


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Three complete caches, written and used 30, 20 and 10 days ago, and a half-built one of today."""
    for age, (name, dtype) in zip((30, 20, 10), (("a", "float16"), ("b", "float32"), ("c", "float16")), strict=True):
        path = tmp_path / f"{name}.zarr"
        build(path, tiny_manifest(IMAGES, name=name, codec=dtype, teacher_dim=10 + age), IMAGES)
        for file in path.rglob("*"):
            os.utime(file, (NOW - age * DAY, NOW - age * DAY))
    half = tmp_path / "half.zarr"
    create(half, tiny_manifest(IMAGES, name="half", teacher_dim=5), IMAGES)
    for file in half.rglob("*"):
        os.utime(file, (NOW, NOW))
    return tmp_path


def chosen(home: Path, **rules: object) -> list[str]:
    records = registry.list_caches(home)
    return [
        found.record.name
        for found in housekeeping.candidates(records, PruneRules.model_validate(rules), now_s=NOW)
        if found.kept_because is None
    ]


def test_rules_choose_by_age_use_state_and_size(home: Path) -> None:
    assert chosen(home) == []
    assert chosen(home, older_than_s=15 * DAY) == ["a", "b"]
    registry.mark_used(home / "a.zarr")
    os.utime(registry.used_file(home / "a.zarr"), (NOW - DAY, NOW - DAY))
    assert chosen(home, unused_for_s=15 * DAY) == ["b"]
    assert chosen(home, older_than_s=15 * DAY) == ["b", "a"]  # least recently used first
    assert chosen(home, incomplete=True) == ["half"]
    sizes = {record.name: record.size_bytes for record in registry.list_caches(home)}
    assert chosen(home, keep_bytes=sum(sizes.values())) == []
    assert chosen(home, keep_bytes=sum(sizes.values()) - 1) == ["b"]
    assert chosen(home, keep_bytes=0) == ["b", "c", "a", "half"]
    assert chosen(home, incomplete=True, keep_bytes=sum(sizes.values()) - sizes["half"]) == ["half"]


def test_using_a_cache_changes_neither_its_size_nor_its_age(home: Path) -> None:
    before = registry.record(home / "a.zarr")
    registry.mark_used(home / "a.zarr")
    after = registry.record(home / "a.zarr")
    assert (before.size_bytes, before.modified_s) == (after.size_bytes, after.modified_s)
    assert after.used_s > before.used_s


def test_a_removed_cache_is_gone_without_a_trace(home: Path) -> None:
    registry.mark_used(home / "b.zarr")
    housekeeping.remove(home / "b.zarr")
    assert sorted(path.name for path in home.iterdir()) == ["a.zarr", "c.zarr", "half.zarr"]


def test_what_is_being_built_or_no_cache_stays(home: Path) -> None:
    with Claims(LocalPlace(home / "half.zarr")) as claims:
        claims.claim((0, 0))
        found = housekeeping.candidates(registry.list_caches(home), PruneRules(incomplete=True), now_s=time.time())
        assert [candidate.kept_because for candidate in found] == ["being built, staged or copied right now"]
        with pytest.raises(StorageError, match="being built, staged or copied right now: nothing was removed"):
            housekeeping.remove(home / "half.zarr")
    housekeeping.remove(home / "half.zarr")
    (home / "photos").mkdir()
    with pytest.raises(StorageError, match="not a cache: nothing was removed"):
        housekeeping.remove(home / "photos")
    assert (home / "photos").is_dir()


@pytest.mark.parametrize(("text", "value"), [("30d", 30 * DAY), ("1.5h", 5400), ("90 m", 5400), ("2w", 14 * DAY)])
def test_times(text: str, value: float) -> None:
    assert housekeeping.seconds(text) == value


@pytest.mark.parametrize(("text", "value"), [("100GB", 10**11), ("1.5 mb", 1_500_000), ("7B", 7)])
def test_sizes(text: str, value: int) -> None:
    assert housekeeping.num_bytes(text) == value


@pytest.mark.parametrize("text", ["", "30", "d", "-3d", "3y", "1e3d", "30 d d", "3D"])
def test_what_is_no_time_is_one_clear_error(text: str) -> None:
    with pytest.raises(RecipeError, match="a time such as 30d"):
        housekeeping.seconds(text)


@pytest.mark.parametrize("text", ["", "30", "GB", "-1GB", "1PB", "1 G"])
def test_what_is_no_size_is_one_clear_error(text: str) -> None:
    with pytest.raises(RecipeError, match="a size such as 100GB"):
        housekeeping.num_bytes(text)
