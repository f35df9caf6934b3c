import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cache_tools.codecs.presets import PresetName
from cache_tools.errors import StorageError, UnknownFormatError
from cache_tools.files import SafeFolder
from cache_tools.format.commits import BlockId
from cache_tools.home import housekeeping, registry
from cache_tools.home.housekeeping import PruneRules
from cache_tools.places import LocalPlace, transfer
from cache_tools.places.claims import Claims
from cache_tools.store.group import read_manifest
from tests.support.cache_factory import build, create, tiny_images, tiny_manifest
from tests.support.hostile import with_right_digests

IMAGES = tiny_images()
DAY = 86_400.0
NOW = 1_000_000_000.0
INCOMPLETE = PruneRules(incomplete=True)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Three complete caches, written and used 30, 20 and 10 days ago, and a half-built one of today."""
    codecs: tuple[PresetName, ...] = ("float16", "float32", "float16")
    for age, name, codec in zip((30, 20, 10), "abc", codecs, strict=True):
        path = tmp_path / f"{name}.zarr"
        build(path, tiny_manifest(IMAGES, name=name, codec=codec, teacher_dim=10 + age), IMAGES)
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
        for found in housekeeping.find_candidates(records, PruneRules.model_validate(rules), now_s=NOW)
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
    before = registry.read_record(home / "a.zarr")
    registry.mark_used(home / "a.zarr")
    after = registry.read_record(home / "a.zarr")
    assert (before.size_bytes, before.modified_s) == (after.size_bytes, after.modified_s)
    assert after.used_s > before.used_s


def test_removing_a_cache_leaves_nothing(home: Path) -> None:
    registry.mark_used(home / "b.zarr")
    housekeeping.remove(home / "b.zarr")
    assert sorted(path.name for path in home.iterdir()) == ["a.zarr", "c.zarr", "half.zarr"]


def test_a_cache_in_use_or_a_plain_folder_is_not_removed(home: Path) -> None:
    with Claims(LocalPlace(home / "half.zarr")) as claims:
        claims.claim(BlockId(0, 0))
        found = housekeeping.find_candidates(registry.list_caches(home), PruneRules(incomplete=True), now_s=time.time())
        assert [candidate.kept_because for candidate in found] == ["being built, staged or copied right now"]
        with pytest.raises(StorageError, match="being built, staged or copied right now: nothing was removed"):
            housekeeping.remove(home / "half.zarr")
    housekeeping.remove(home / "half.zarr")
    (home / "photos").mkdir()
    with pytest.raises(StorageError, match="not a cache: nothing was removed"):
        housekeeping.remove(home / "photos")
    assert (home / "photos").is_dir()


def at_a_block(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Call `act` once, when a copy reaches its block of this number."""
    copied, copy_block = [], transfer.copy_block

    def acting(*arguments: object) -> list[int]:
        copied.append(arguments)
        if len(copied) == number:
            act()
        return copy_block(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(transfer, "copy_block", acting)


def test_a_cache_that_is_being_copied_is_not_removed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if another copy of the same cache ends meanwhile."""
    source, target = LocalPlace(home / "a.zarr"), LocalPlace(home / "copy.zarr")

    def try_to_remove() -> None:
        transfer.copy_cache(source, target)
        (found,) = (each for each in registry.list_caches(home) if each.path == target.path)
        (candidate,) = housekeeping.find_candidates([found], PruneRules(keep_bytes=0))
        assert candidate.kept_because == "being built, staged or copied right now"
        with pytest.raises(StorageError, match="copied right now: nothing was removed"):
            housekeeping.remove(target.path)

    at_a_block(monkeypatch, 5, try_to_remove)
    transfer.copy_cache(source, target)
    assert not list(home.glob(".*.claims"))
    assert registry.read_record(target.path).complete
    housekeeping.remove(target.path)


def test_a_copy_fails_if_its_target_is_removed_meanwhile(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = LocalPlace(home / "a.zarr"), LocalPlace(home / "copy.zarr")
    at_a_block(monkeypatch, 5, lambda: target.path.rename(home / "gone"))
    with pytest.raises(StorageError, match=r"removed while it was copied.*Run the same command again"):
        transfer.copy_cache(source, target)
    assert not list(home.glob(".*.claims"))
    transfer.copy_cache(source, target)
    assert registry.read_record(target.path).complete


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format_version": 3}, "written by another version of teacher-cache: it may be sound"),
        ({"num_views": 4}, None),
    ],
)
def test_a_cache_of_a_newer_version_is_not_damaged(home: Path, change: dict[str, int], why: str | None) -> None:
    file = home / "a.zarr" / "zarr.json"
    group = json.loads(file.read_bytes())
    group["attributes"]["teacher_cache"] |= change
    file.write_text(json.dumps(group))
    records = registry.list_caches(home)
    for rules in (INCOMPLETE, PruneRules(keep_bytes=0)):
        (found,) = (
            each for each in housekeeping.find_candidates(records, rules) if each.record.path == home / "a.zarr"
        )
        assert found.kept_because == why


def test_a_cache_with_fields_of_a_newer_version_is_not_damaged(home: Path) -> None:
    """Its digest is right, so it is as it was written."""
    file = home / "a.zarr" / "zarr.json"
    group = json.loads(file.read_bytes())
    group["attributes"]["teacher_cache"] = with_right_digests(group["attributes"]["teacher_cache"] | {"tide": "high"})
    file.write_text(json.dumps(group))
    with pytest.raises(UnknownFormatError, match="tide"):
        read_manifest(home / "a.zarr")


def test_an_unreadable_cache_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = SafeFolder.read_bytes

    def read_bytes(folder: SafeFolder, name: str, limit: int | None = None) -> bytes:
        if folder.path == home / "a.zarr" and name == "zarr.json":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(folder.path / name))
        return read(folder, name, limit)

    monkeypatch.setattr(SafeFolder, "read_bytes", read_bytes)
    found = {
        each.record.path.name: each for each in housekeeping.find_candidates(registry.list_caches(home), INCOMPLETE)
    }
    assert found["a.zarr"].kept_because == "it cannot be read right now: it may be sound"
    assert found["half.zarr"].kept_because is None


def test_removing_a_link_keeps_the_cache(home: Path, tmp_path: Path) -> None:
    elsewhere = shutil.move(home / "b.zarr", tmp_path.parent / f"{tmp_path.name}-elsewhere.zarr")
    (home / "b.zarr").symlink_to(elsewhere, target_is_directory=True)
    records = registry.list_caches(home)
    sizes = {record.name: record.size_bytes for record in records}
    assert chosen(home, older_than_s=15 * DAY) == ["a"]
    assert chosen(home, keep_bytes=sum(sizes.values()) - sizes["b"]) == [], "it takes no room here"
    housekeeping.remove(home / "b.zarr")
    assert sorted(path.name for path in home.iterdir() if not path.name.startswith(".")) == [
        "a.zarr",
        "c.zarr",
        "half.zarr",
    ]
    assert registry.read_record(Path(elsewhere)).complete


def test_kept_caches_count_towards_the_size(home: Path) -> None:
    """Space of caches that cannot be removed is not counted as freed."""
    sizes = {record.name: record.size_bytes for record in registry.list_caches(home)}
    with Claims(LocalPlace(home / "a.zarr")) as claims:
        claims.claim(BlockId(0, 0))
        records = registry.list_caches(home)
        now_s = time.time()
        rules = PruneRules(older_than_s=now_s - NOW + 25 * DAY, keep_bytes=sum(sizes.values()) - sizes["b"])
        found = housekeeping.find_candidates(records, rules, now_s=now_s)
        going = [each.record.name for each in found if each.kept_because is None]
        assert [each.record.name for each in found if each.kept_because] == ["a"]
        assert going == ["b"]
        assert housekeeping.remaining_bytes(records, {home / "b.zarr"}) == rules.keep_bytes


@pytest.mark.parametrize("alive", [True, False])
def test_a_claim_from_the_future_keeps_a_cache_only_if_it_is_renewed(
    home: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    """After a clock was set back, the time of a claim does not tell whether somebody still holds it."""
    monkeypatch.setattr(housekeeping, "RENEWED_S", 0.2)
    claim = home / ".a.zarr.claims" / "0.0.0"
    claim.parent.mkdir()
    claim.write_bytes(b"of another machine")
    os.utime(claim, (time.time() + DAY, time.time() + DAY))
    if not alive:
        housekeeping.remove(home / "a.zarr")
        assert not (home / "a.zarr").exists()
        return
    heartbeat = threading.Timer(0.05, claim.touch)
    heartbeat.start()
    with pytest.raises(StorageError, match="right now"):
        housekeeping.remove(home / "a.zarr")
    heartbeat.join()
    assert (home / "a.zarr").exists()


def test_times_in_the_future_do_not_keep_a_cache_forever(home: Path) -> None:
    tomorrow = time.time() + DAY
    registry.mark_used(home / "a.zarr")
    os.utime(registry.used_file(home / "a.zarr"), (tomorrow, tomorrow))
    for file in (home / "b.zarr").rglob("*"):
        os.utime(file, (tomorrow, tomorrow))
    now_s = time.time()
    used = {record.name: record.used_s for record in registry.list_caches(home)}
    assert used["a"] == pytest.approx(now_s, abs=60)
    assert used["b"] == pytest.approx(now_s, abs=60)
    again = {record.name: record.used_s for record in registry.list_caches(home)}
    assert again["a"] <= used["a"] + 1  # from now on the age counts
    os.utime(registry.used_file(home / "b.zarr"), (now_s - DAY, now_s - DAY))
    assert {record.name: record.used_s for record in registry.list_caches(home)}["b"] == now_s - DAY
