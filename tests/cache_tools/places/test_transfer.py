import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cache_tools.errors import FormatError, MismatchError, NotFoundError, RecipeError, StorageError
from cache_tools.format.commits import BlockId
from cache_tools.integrity.local import verify
from cache_tools.places import LocalPlace, Place, arrays, metadata, open_place, transfer
from cache_tools.places.claims import Claims
from cache_tools.places.transfer import copy_cache, list_committed
from cache_tools.reader import TeacherCache
from cache_tools.store.writer import CacheWriter
from tests.support.cache_factory import build, create, tiny_constants, tiny_images, tiny_manifest, tiny_targets, write
from tests.support.s3_server import new_bucket
from tests.support.turns import slow, turns

pytestmark = pytest.mark.medium

IMAGES = tiny_images()
MANIFEST = tiny_manifest(IMAGES)


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place of either kind."""
    if request.param == "folder":
        return LocalPlace(tmp_path / "elsewhere")
    request.getfixturevalue("server")
    return open_place(f"s3://{new_bucket()}/group/elsewhere")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    build(tmp_path / "cache", MANIFEST, IMAGES)
    return tmp_path / "cache"


def files(place: Place) -> dict[str, bytes]:
    return {entry.key: place.read(entry.key) for entry in place.entries()}


def same_targets(first: Path, second: Path) -> None:
    one, other = TeacherCache.open(first), TeacherCache.open(second)
    other.require_complete()
    for view in range(one.num_views):
        for name in ("fused_logits", "fused_features"):
            np.testing.assert_array_equal(one.read_array(name, view), other.read_array(name, view))
    np.testing.assert_array_equal(one.labels, other.labels)


# Places


def test_reading_gives_what_was_put_last(place: Place) -> None:
    assert place.put("a/b.bin", b"first")
    assert not place.put("a/b.bin", b"second", only_new=True)
    assert place.read("a/b.bin") == b"first"
    assert place.put("a/b.bin", b"third")
    assert place.put("c", b"", only_new=True)
    assert {entry.key: entry.size for entry in place.entries()} == {"a/b.bin": 5, "c": 0}
    assert [entry.key for entry in place.entries("a")] == ["a/b.bin"]
    assert set(place.keys()) == {"a/b.bin", "c"}
    assert (place.has("c"), place.has("a/b.bin"), place.has("a"), place.has("d")) == (True, True, False, False)
    place.delete(["c", "never there"])
    assert [entry.key for entry in place.entries()] == ["a/b.bin"]
    with pytest.raises(FileNotFoundError):
        place.read("c")


def test_files_are_dated_by_the_place(place: Place) -> None:
    place.put("early", b"1")
    place.put("late", b"2")
    times = {entry.key: entry.modified_s for entry in place.entries()}
    assert times["early"] <= times["late"] <= times["early"] + 60


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "s3://"])
def test_a_malformed_url_is_one_clear_error(url: str) -> None:
    with pytest.raises(RecipeError, match="not a URL of an object store"):
        open_place(url)


def test_a_missing_bucket_is_one_clear_error(server: str) -> None:
    with pytest.raises((StorageError, NotFoundError)) as caught:
        copy_cache(open_place("s3://no-such-bucket-here/x"), LocalPlace(Path("/nonexistent")))
    assert "\n" not in str(caught.value)


def test_a_remote_place_without_obstore_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(NotFoundError, match=r"pip install 'teacher-cache\[remote\]'"):
        open_place("s3://bucket/x")


# Copies


def test_a_round_trip_keeps_every_file(cache: Path, place: Place, tmp_path: Path) -> None:
    pushed = copy_cache(LocalPlace(cache), place)
    assert files(place) == files(LocalPlace(cache))
    assert pushed.blocks == MANIFEST.num_views * MANIFEST.num_blocks
    assert pushed.bytes == sum(len(data) for data in files(place).values())
    assert pushed.files == len(files(place))
    copy_cache(place, LocalPlace(tmp_path / "back"))
    same_targets(cache, tmp_path / "back")


def test_a_second_copy_writes_nothing(cache: Path, place: Place) -> None:
    copy_cache(LocalPlace(cache), place)
    again = copy_cache(LocalPlace(cache), place)
    assert (again.blocks, again.files, again.bytes) == (0, 0, 0)
    assert again.blocks_there == MANIFEST.num_views * MANIFEST.num_blocks


def test_only_what_is_missing_is_copied(place: Place, tmp_path: Path) -> None:
    """A half-built cache, then more of it, then more views."""
    targets, total = tiny_targets(MANIFEST), MANIFEST.num_views * MANIFEST.num_blocks
    writer = create(tmp_path / "cache", MANIFEST, IMAGES)
    missing = writer.missing_blocks()
    write(writer, targets, missing[:5])
    first = copy_cache(LocalPlace(tmp_path / "cache"), place)
    assert (first.blocks, first.blocks_missing) == (5, total - 5)
    assert list_committed(place) == set(missing[:5])
    write(writer, targets, missing[5:])
    second = copy_cache(LocalPlace(tmp_path / "cache"), place)
    assert (second.blocks, second.blocks_there, second.blocks_missing) == (total - 5, 5, 0)
    grown = writer.grow(MANIFEST.num_views + 1)
    more = tiny_targets(grown.manifest, seed=3)
    write(grown, more)
    third = copy_cache(LocalPlace(tmp_path / "cache"), place)
    assert third.blocks == MANIFEST.num_blocks
    copy_cache(place, LocalPlace(tmp_path / "back"))
    same_targets(tmp_path / "cache", tmp_path / "back")


def test_a_copy_of_some_views_is_a_half_built_cache(cache: Path, place: Place, tmp_path: Path) -> None:
    copy_cache(LocalPlace(cache), place, views=[1])
    copy_cache(place, LocalPlace(tmp_path / "back"))
    assert TeacherCache.open(tmp_path / "back").complete_views == (1,)
    writer = CacheWriter.resume(tmp_path / "back", MANIFEST.fingerprint)
    write(writer, tiny_targets(MANIFEST))
    same_targets(cache, tmp_path / "back")


@pytest.mark.turns
def test_a_copy_interrupted_at_any_file_can_be_continued(cache: Path, tmp_path: Path) -> None:
    """The target fails after n files, for many n: it is no cache or a valid half, and the next copy completes it."""
    total = len(list(LocalPlace(cache).entries()))
    for limit in range(0, total, turns(9, 3)):
        path = tmp_path / f"cut-{limit}"
        with pytest.raises(StorageError, match="cut"):
            copy_cache(LocalPlace(cache), Cut(path, limit))
        if (path / "zarr.json").exists():
            half = TeacherCache.open(path)
            for view in half.complete_views:
                half.load_view(view)
        copy_cache(LocalPlace(cache), LocalPlace(path))
        same_targets(cache, path)


@pytest.mark.parametrize("name", ["fused_logits/c.1.2.0", "commits/c.1.2.0", slow("fused_features/c.1.2.0")])
def test_a_damaged_block_is_not_copied(cache: Path, place: Place, name: str) -> None:
    data = bytearray((cache / name).read_bytes())
    data[len(data) // 2] ^= 1
    (cache / name).write_bytes(data)
    with pytest.raises(FormatError, match=r"view 1, block 2.*Remove commits/c\.1\.2\.0"):
        copy_cache(LocalPlace(cache), place)
    assert (1, 2) not in list_committed(place)


def test_rows_of_another_commit_are_not_copied(cache: Path, place: Place) -> None:
    """Undamaged files that are not the committed ones."""
    (cache / "fused_logits/c.1.2.0").write_bytes((cache / "fused_logits/c.1.3.0").read_bytes())
    with pytest.raises(FormatError, match="not those that were committed"):
        copy_cache(LocalPlace(cache), place)


def test_another_cache_at_the_target_is_not_changed(cache: Path, place: Place, tmp_path: Path) -> None:
    build(tmp_path / "other", tiny_manifest(IMAGES, codec="float32"), IMAGES)
    copy_cache(LocalPlace(tmp_path / "other"), place)
    before = files(place)
    with pytest.raises(MismatchError, match="another cache is at the target"):
        copy_cache(LocalPlace(cache), place)
    assert files(place) == before


def test_a_folder_of_other_files_is_not_changed(cache: Path, place: Place) -> None:
    place.put("caches/notes.txt", b"mine")
    with pytest.raises(StorageError, match=r"the place is taken.*found caches"):
        copy_cache(LocalPlace(cache), place)
    assert files(place) == {"caches/notes.txt": b"mine"}


def test_copies_of_two_builds_to_one_place_do_not_mix(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second starts when the first has written all but the manifest: it waits, then finds another cache there."""
    other = CacheWriter.create(
        tmp_path / "other",
        MANIFEST,
        labels=IMAGES.labels,
        sample_keys=IMAGES.keys,
        constants=tiny_constants(MANIFEST, seed=5),
    ).path
    target, met, read_file = LocalPlace(tmp_path / "target"), threading.Event(), arrays.read_file
    claim, put_group = Claims.claim, threading.Event()

    def claim_and_signal(claims: Claims, block: BlockId) -> bool:
        done = claim(claims, block)
        if not done:
            met.set()
        return done

    def read_and_wait(source: Place, key: str, limit: int) -> bytes:
        if key == "zarr.json" and str(source) == str(other):  # reached only if it did not wait
            met.set()
            assert put_group.wait(60)
        if key == "zarr.json" and str(source) == str(cache):
            late.append(pool.submit(copy_cache, LocalPlace(other), target))
            assert met.wait(60)
        return read_file(source, key, limit)

    late: list[Future[transfer.CopySummary]] = []
    monkeypatch.setattr(Claims, "claim", claim_and_signal)
    monkeypatch.setattr(metadata, "read_file", read_and_wait)
    with ThreadPoolExecutor(1) as pool:
        copy_cache(LocalPlace(cache), target)
        put_group.set()
        with pytest.raises(MismatchError, match="must not be mixed"):
            late[0].result()
    assert not verify(target.path).problems
    same_targets(cache, target.path)


def test_a_complete_target_is_not_written_to(cache: Path, tmp_path: Path) -> None:
    """Not even a claim is written: the target may be read-only."""
    copy_cache(LocalPlace(cache), LocalPlace(tmp_path / "share" / "c.zarr"))
    before = (tmp_path / "share").stat().st_mtime_ns
    copy_cache(LocalPlace(cache), LocalPlace(tmp_path / "share" / "c.zarr"))
    assert (tmp_path / "share").stat().st_mtime_ns == before


class Cut(LocalPlace):
    """A folder that fails after `limit` files, like a full disk or a lost connection."""

    def __init__(self, path: Path, limit: int) -> None:
        super().__init__(path)
        self._left = limit

    def put(self, key: str, data: bytes, *, only_new: bool = False, durable: bool = True) -> bool:
        self._left -= 1
        if self._left < 0:
            raise StorageError("cut", where=self)
        return super().put(key, data, only_new=only_new, durable=durable)


def test_a_target_whose_parent_is_read_only(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example a mounted folder: claims would be beside it."""
    put = LocalPlace.put

    def refused(place: LocalPlace, key: str, data: bytes, **options: bool) -> bool:
        if place.name.endswith(".claims"):
            raise StorageError("cannot write or read: Permission denied", where=place)
        return put(place, key, data, **options)

    monkeypatch.setattr(LocalPlace, "put", refused)
    copy_cache(LocalPlace(cache), LocalPlace(tmp_path / "c.zarr"))
    assert not verify(tmp_path / "c.zarr").problems
    same_targets(cache, tmp_path / "c.zarr")


def test_a_claim_that_cannot_be_removed_does_not_stop_a_copy(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example a store with permission to write but not to delete."""

    def refused(place: LocalPlace, keys: Sequence[str]) -> None:
        raise StorageError("access denied", where=place)

    monkeypatch.setattr(LocalPlace, "delete", refused)
    copy_cache(LocalPlace(cache), LocalPlace(tmp_path / "c.zarr"))
    same_targets(cache, tmp_path / "c.zarr")
