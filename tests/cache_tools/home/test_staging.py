"""Remote caches: what is staged when and by which process, and what works without the store."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache_tools.errors import FormatError, IncompleteError, MismatchError, NotFoundError, StorageError
from cache_tools.files import SafeFolder
from cache_tools.format.commits import BlockId
from cache_tools.format.manifest import Fusion
from cache_tools.home import registry
from cache_tools.home.origin import read_origin
from cache_tools.places import LocalPlace, open_place
from cache_tools.places.claims import Claims
from cache_tools.places.metadata import manifest_at
from cache_tools.reader import TeacherCache
from cache_tools.store.writer import CacheWriter
from tests.support.cache_factory import build, create, tiny_constants, tiny_images, tiny_manifest, tiny_targets, write
from tests.support.flaky_proxy import FlakyProxy, flaky_proxy
from tests.support.s3_server import new_bucket, upload
from tests.support.turns import slow

IMAGES = tiny_images()
MANIFEST = tiny_manifest(IMAGES)
VIEWS, BLOCKS = MANIFEST.num_views, MANIFEST.num_blocks


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache home."""
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TEACHER_CACHE_OFFLINE", raising=False)
    return tmp_path / "home"


@pytest.fixture
def proxy(server: str, home: Path) -> Iterator[FlakyProxy]:
    """A proxy that fails nothing yet, in front of the S3 server."""
    with flaky_proxy() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache, for copying only."""
    path = tmp_path_factory.mktemp("built") / "local.zarr"
    build(path, MANIFEST, IMAGES)
    return path


@pytest.fixture
def local(tmp_path: Path, built: Path) -> Path:
    """A complete cache on this disk, not in the home."""
    return Path(shutil.copytree(built, tmp_path / "local.zarr"))


@pytest.fixture
def url(proxy: FlakyProxy, local: Path) -> str:
    return publish(local, proxy)


def publish(path: Path, proxy: FlakyProxy, url: str | None = None) -> str:
    url = url or f"s3://{new_bucket()}/caches/tiny.zarr"
    upload(path, url)
    proxy.forget()
    return url


def data_requests(proxy: FlakyProxy) -> list[str]:
    """The chunks of target arrays that were read: `fused_logits/c.1.0.0`, …"""
    return sorted(path.partition(".zarr/")[2] for path in proxy.paths("GET") if "/fused_" in path and "/c." in path)


def test_a_remote_cache_reads_as_the_local_one(url: str, local: Path, home: Path) -> None:
    remote, reference = TeacherCache.open(url), TeacherCache.open(local)
    assert remote.path == registry.cache_path("tiny", MANIFEST.fingerprint)
    assert remote.path.parent == home
    assert remote.manifest == reference.manifest
    assert remote.is_complete
    np.testing.assert_array_equal(remote.labels, reference.labels)
    np.testing.assert_array_equal(remote.sample_keys, reference.sample_keys)
    np.testing.assert_array_equal(remote.constant("class_embeddings"), reference.constant("class_embeddings"))
    index = np.arange(MANIFEST.num_samples)
    for view in range(VIEWS):
        staged_view, local_view = remote.load_view(view), reference.load_view(view)
        assert staged_view.logits(index).equal(local_view.logits(index))
        assert staged_view.features(index).equal(local_view.features(index))
        np.testing.assert_array_equal(
            remote.read_array("fused_logits", view), reference.read_array("fused_logits", view)
        )


def test_blocks_of_a_remote_view_equal_those_of_a_local_one(url: str, local: Path) -> None:
    remote, reference = TeacherCache.open(url), TeacherCache.open(local)
    blocks = [BLOCKS - 1, 0]
    assert (
        remote.load_view(1, blocks=blocks)
        .logits(slice(None))
        .equal(reference.load_view(1, blocks=blocks).logits(slice(None)))
    )


def test_views_are_staged_when_they_are_needed(proxy: FlakyProxy, url: str) -> None:
    cache = TeacherCache.open(url)
    cache.require_complete()
    assert cache.labels.shape == (MANIFEST.num_samples,)
    assert data_requests(proxy) == []
    cache.load_view(1)
    assert data_requests(proxy) == [
        f"{name}/c.1.{block}.0" for name in ("fused_features", "fused_logits") for block in range(BLOCKS)
    ]
    proxy.forget()
    cache.load_view(1)
    cache.read_array("fused_logits", 1, slice(3, 40))
    assert proxy.seen == [], "views that are staged and known to be complete need no store"
    cache.read_array("fused_logits", 2, slice(0, 1))
    assert {path.split(".")[1] for path in data_requests(proxy)} == {"2"}


def test_staged_bytes_are_counted_and_printed(url: str, local: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cache = TeacherCache.open(url)
    assert cache.origin is not None
    metadata = cache.origin.bytes
    cache.load_view(0)
    blocks = sum(file.stat().st_size for file in local.rglob("c.0.*") if "fused" in str(file) or "commits" in str(file))
    assert cache.origin.bytes - metadata == blocks
    assert f"stage tiny, view 0: {BLOCKS}/{BLOCKS} blocks" in capfd.readouterr().err
    for view in range(1, VIEWS):
        cache.load_view(view)
    assert cache.origin.bytes == sum(file.stat().st_size for file in local.rglob("*") if file.is_file())


def test_a_second_reader_uses_what_is_staged(proxy: FlakyProxy, url: str) -> None:
    TeacherCache.open(url).load_view(1)
    proxy.forget()
    again = TeacherCache.open(url)
    again.load_view(1)
    assert proxy.paths("GET") == [proxy.paths("GET")[0]], "only the manifest is read"
    assert proxy.paths("GET")[0].endswith("tiny.zarr/zarr.json")


def test_a_cache_built_here_reads_nothing_from_the_store(proxy: FlakyProxy, url: str, local: Path) -> None:
    build(registry.cache_path("tiny", MANIFEST.fingerprint), MANIFEST, IMAGES)
    TeacherCache.open(url).load_view(2)
    assert data_requests(proxy) == []


def test_a_cache_built_here_is_no_mirror(proxy: FlakyProxy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its URL opens it, even without a network, and blocks that it lacks are not staged."""
    path = registry.cache_path("tiny", MANIFEST.fingerprint)
    build(path, MANIFEST, IMAGES)
    TeacherCache.open(url).load_view(0)
    with monkeypatch.context() as patch:
        patch.setenv("TEACHER_CACHE_OFFLINE", "1")
        TeacherCache.open(url).load_view(1)
    (path / "commits" / "c.1.2.0").unlink()
    assert registry.find("tiny").origin is None
    cache = TeacherCache.open("tiny")
    assert cache.origin is None
    with pytest.raises(IncompleteError, match="not completely built"):
        cache.load_view(1)
    TeacherCache.open(url).load_view(1)
    assert registry.find("tiny").origin == url, "now it is a mirror"


def test_a_read_only_home_with_the_cache_works(proxy: FlakyProxy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build(registry.cache_path("tiny", MANIFEST.fingerprint), MANIFEST, IMAGES)

    def refuse(folder: SafeFolder, name: str, data: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder.path / name))

    monkeypatch.setattr(SafeFolder, "put", refuse)
    TeacherCache.open(url).load_view(2)


def test_a_remote_cache_that_cannot_be_opened_leaves_nothing(proxy: FlakyProxy, url: str, home: Path) -> None:
    open_place(url).delete(["labels/c.0"])
    with pytest.raises(FormatError, match="missing file"):
        TeacherCache.open(url)
    assert not list(home.iterdir())


def test_a_separate_clip_view_is_staged_too(proxy: FlakyProxy, tmp_path: Path) -> None:
    manifest = tiny_manifest(IMAGES, store="components")
    build(tmp_path / "c.zarr", manifest, IMAGES)
    cache = TeacherCache.open(publish(tmp_path / "c.zarr", proxy))
    fusion = replace(Fusion.stored(manifest), clip_view=0)
    cache.load_view(2, fusion=fusion)
    staged = {path.partition("/c.")[2][0] for path in proxy.paths("GET") if "_features/c." in path}
    assert staged == {"0", "2"}


# A remote cache that is being built


def test_a_half_built_remote_cache_shows_its_complete_views(proxy: FlakyProxy, tmp_path: Path) -> None:
    writer, targets = create(tmp_path / "half.zarr", MANIFEST, IMAGES), tiny_targets(MANIFEST)
    missing = writer.missing_blocks()
    write(writer, targets, missing[: BLOCKS + 2])
    url = publish(tmp_path / "half.zarr", proxy)
    cache = TeacherCache.open(url)
    assert cache.complete_views == (0,)
    assert not cache.is_complete
    with pytest.raises(IncompleteError, match=f"{url}.*1 complete, {2 * BLOCKS - 2} of {3 * BLOCKS} blocks missing"):
        cache.require_complete()
    with pytest.raises(IncompleteError, match=r"view 1 is not completely built.*2–4 missing"):
        cache.load_view(1)
    assert data_requests(proxy) == [], "nothing is staged for an incomplete view"
    np.testing.assert_array_equal(cache.read_array("fused_logits", 1, slice(0, 20)), targets["fused_logits"][1, :20])
    write(writer, targets)
    publish(tmp_path / "half.zarr", proxy, url)
    same_reader = cache
    assert same_reader.is_complete, "it sees the new blocks"
    np.testing.assert_array_equal(cache.read_array("fused_logits", 1), targets["fused_logits"][1])


def test_reopening_a_remote_cache_shows_its_growth(proxy: FlakyProxy, url: str, local: Path) -> None:
    TeacherCache.open(url).load_view(0)
    grown = CacheWriter.resume(local, MANIFEST.fingerprint).grow(VIEWS + 2)
    targets = tiny_targets(grown.manifest, seed=9)
    write(grown, targets)
    publish(local, proxy, url)
    cache = TeacherCache.open(url)
    assert cache.num_views == VIEWS + 2
    assert cache.is_complete
    np.testing.assert_array_equal(cache.read_array("fused_features", VIEWS), targets["fused_features"][VIEWS])


def correct_test_split(local: Path, url: str, split: str | tuple[str, ...] | None) -> None:
    """What `build-cache --out URL` does with a complete cache whose recipe names other test splits."""
    found = {"teacher_top1": 0.5, "n": 4, "split": "val"}
    CacheWriter.resume(local, MANIFEST.fingerprint).record_test_split(split, found, None)
    open_place(url).put("zarr.json", (local / "zarr.json").read_bytes())


@pytest.mark.parametrize("views", [1, VIEWS])
def test_a_mirror_follows_the_test_split_of_the_store(
    url: str, local: Path, capfd: pytest.CaptureFixture[str], views: int
) -> None:
    mirror = TeacherCache.open(url)
    for view in range(views):
        mirror.load_view(view)
    correct_test_split(local, url, ("val", "v2"))
    assert TeacherCache.open("tiny").manifest.dataset.test_split == "test", "its name asks no store"
    capfd.readouterr()
    for reference in (url, "tiny"):
        cache = TeacherCache.open(reference)
        assert cache.manifest == TeacherCache.open(local).manifest
        assert cache.manifest.preflight == {"teacher_top1": 0.5, "n": 4, "split": "val"}
        for view in range(VIEWS):
            assert cache.load_view(view).logits([0, 3]).equal(TeacherCache.open(local).load_view(view).logits([0, 3]))
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note")]
    assert told == ["note: the test split of this cache is now val, v2 (it was test)"]


def test_a_mirror_with_more_views_than_the_store_keeps_them(url: str, local: Path) -> None:
    mirror = TeacherCache.open(url).path
    CacheWriter.resume(mirror, MANIFEST.fingerprint).grow(VIEWS + 1)
    correct_test_split(local, url, None)
    found = TeacherCache.open(url).manifest
    assert (found.num_views, found.dataset.test_split) == (VIEWS + 1, None)


def test_a_cache_built_here_keeps_its_test_split(url: str, local: Path) -> None:
    build(registry.cache_path("tiny", MANIFEST.fingerprint), MANIFEST, IMAGES)
    correct_test_split(local, url, "val")
    assert TeacherCache.open(url).manifest.dataset.test_split == "test"


def test_a_read_only_mirror_is_used_with_a_warning(
    url: str, local: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for view in range(VIEWS):
        TeacherCache.open(url).load_view(view)
    correct_test_split(local, url, "val")

    def refuse(folder: SafeFolder, name: str, data: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder.path / name))

    monkeypatch.setattr(SafeFolder, "put", refuse)
    assert TeacherCache.open(url).manifest.dataset.test_split == "test"
    assert "Students are tested on the split that the mirror names" in capfd.readouterr().err


def test_blocks_that_only_the_mirror_has_are_readable(proxy: FlakyProxy, tmp_path: Path) -> None:
    """The same recipe, half-built in the store and half-built here."""
    in_store, targets = create(tmp_path / "half.zarr", MANIFEST, IMAGES), tiny_targets(MANIFEST)
    write(in_store, targets, [(0, block) for block in range(BLOCKS)])
    url = publish(tmp_path / "half.zarr", proxy)
    mirror = create(registry.cache_path("tiny", MANIFEST.fingerprint), MANIFEST, IMAGES)
    write(mirror, targets, [(1, block) for block in range(BLOCKS)])
    cache = TeacherCache.open(url)
    assert cache.complete_views == (0, 1)
    for view in (0, 1):
        np.testing.assert_array_equal(cache.read_array("fused_logits", view), targets["fused_logits"][view])


# By name, and without a network


def test_a_mirror_found_by_name_continues_staging(proxy: FlakyProxy, url: str, home: Path) -> None:
    TeacherCache.open(url).load_view(0)
    for reference in ("tiny", MANIFEST.fingerprint[:8]):
        cache = TeacherCache.open(reference)
        assert cache.origin is not None
        assert cache.origin.url == url
        assert cache.is_complete
    cache.load_view(2)
    assert registry.read_complete_views(cache.path, MANIFEST) == [0, 2]


def test_staged_views_work_without_the_store(proxy: FlakyProxy, url: str, capfd: pytest.CaptureFixture[str]) -> None:
    first = TeacherCache.open(url)
    assert first.is_complete
    for view in (0, 1):
        first.load_view(view)
    capfd.readouterr()
    with proxy.gone():
        cache = TeacherCache.open(url)
        warning = capfd.readouterr().err
        assert warning.startswith("warning: the object store does not answer as it should")
        assert f"Continuing with what is staged in {cache.path}" in warning
        assert len(warning.splitlines()) == 1
        cache.require_complete()
        cache.load_view(0)
        cache.load_view(1)
        assert TeacherCache.open("tiny").load_view(0) is not None
        assert capfd.readouterr().err == ""
        with pytest.raises(StorageError, match="does not answer as it should"):
            cache.load_view(2)
    cache.load_view(2)


def test_without_store_and_staged_views_opening_is_one_error(proxy: FlakyProxy, url: str) -> None:
    with proxy.gone(), pytest.raises(StorageError, match="does not answer as it should"):
        TeacherCache.open(url)


def test_a_half_built_remote_cache_without_its_store(
    proxy: FlakyProxy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Opened by name: a warning if views are staged, else one error."""
    writer = create(tmp_path / "half.zarr", MANIFEST, IMAGES)
    write(writer, tiny_targets(MANIFEST), [(view, block) for view in (0, 1) for block in range(BLOCKS)])
    cache = TeacherCache.open(publish(tmp_path / "half.zarr", proxy))
    with proxy.gone(), pytest.raises(StorageError, match="does not answer as it should"):
        cache.complete_views  # noqa: B018
    assert cache.complete_views == (0, 1)
    cache.load_view(1)
    capfd.readouterr()
    with proxy.gone():
        again = TeacherCache.open("tiny")
        assert again.complete_views == (1,)
        assert again.complete_views == (1,)
        again.load_view(1)
    assert capfd.readouterr().err.count("warning: the object store does not answer") == 1


def test_offline_sends_no_requests(
    proxy: FlakyProxy, url: str, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEACHER_CACHE_OFFLINE", "1")
    with pytest.raises(NotFoundError, match="nothing of this cache is staged, and TEACHER_CACHE_OFFLINE is set"):
        TeacherCache.open(url)
    monkeypatch.setenv("TEACHER_CACHE_OFFLINE", "0")
    cache = TeacherCache.open(url)
    assert cache.is_complete
    cache.load_view(0)
    monkeypatch.setenv("TEACHER_CACHE_OFFLINE", "1")
    capfd.readouterr()
    proxy.forget()
    for reference in (url, "tiny"):
        again = TeacherCache.open(reference)
        again.require_complete()
        again.load_view(0)
        with pytest.raises(
            StorageError, match=r"view 1 is not staged, and TEACHER_CACHE_OFFLINE is set.*cache-tools pull"
        ):
            again.load_view(1)
    assert proxy.seen == []
    assert capfd.readouterr().err == ""


def test_another_cache_at_the_url_gets_its_own_mirror(proxy: FlakyProxy, url: str, local: Path, tmp_path: Path) -> None:
    first = TeacherCache.open(url)
    first.load_view(0)
    open_place(url).delete([entry.key for entry in open_place(url).entries()])
    with pytest.raises(NotFoundError, match=f"no cache here.*What was staged of it is in {first.path}"):
        TeacherCache.open(url)
    other = tiny_manifest(IMAGES, codec="float32")
    build(tmp_path / "other.zarr", other, IMAGES)
    publish(tmp_path / "other.zarr", proxy, url)
    assert TeacherCache.open(url).manifest.fingerprint == other.fingerprint
    by_path = TeacherCache.open(first.path)
    by_path.load_view(0)
    with pytest.raises(MismatchError, match="staged from has another cache now"):
        by_path.load_view(1)


def test_a_rebuilt_cache_at_the_url_is_not_mixed_in(proxy: FlakyProxy, url: str, tmp_path: Path) -> None:
    TeacherCache.open(url).load_view(0)
    open_place(url).delete([entry.key for entry in open_place(url).entries()])
    writer = CacheWriter.create(
        tmp_path / "rebuilt.zarr",
        MANIFEST,
        labels=IMAGES.labels,
        sample_keys=IMAGES.keys,
        constants=tiny_constants(MANIFEST, seed=8),
    )
    write(writer, tiny_targets(MANIFEST))
    publish(writer.path, proxy, url)
    by_name = TeacherCache.open("tiny")
    by_name.load_view(0)
    with pytest.raises(MismatchError, match="must not be mixed"):
        by_name.load_view(1)
    assert registry.read_complete_views(by_name.path, MANIFEST) == [0]


# What is no cache


def test_a_folder_of_caches_names_them(proxy: FlakyProxy, url: str) -> None:
    folder = url.removesuffix("/tiny.zarr")
    with pytest.raises(NotFoundError, match=rf"this is a folder, not a cache.*tiny\.zarr.*`cache-tools ls {folder}`"):
        TeacherCache.open(folder)
    with pytest.raises(NotFoundError, match="no cache here"):
        TeacherCache.open(f"{folder}/nothing")


def test_a_damaged_or_foreign_manifest_is_a_clear_error(proxy: FlakyProxy, url: str, home: Path) -> None:
    store = open_place(url)
    text = store.read("zarr.json")
    for wrong in (b"{", text.replace(b'"num_views": 3', b'"num_views": 4'), b'{"attributes": {}}'):
        store.put("zarr.json", wrong)
        with pytest.raises(FormatError):
            TeacherCache.open(url)
    assert not home.exists()


@pytest.mark.parametrize("name", ["fused_logits/c.1.2.0", "commits/c.1.2.0", "fused_logits/c.1.2.0 gone"])
def test_a_damaged_block_is_never_staged(proxy: FlakyProxy, url: str, name: str) -> None:
    key, _, gone = name.partition(" ")
    store = open_place(url)
    if gone:
        store.delete([key])
    else:
        data = bytearray(store.read(key))
        data[len(data) // 2] ^= 1
        store.put(key, bytes(data))
    cache = TeacherCache.open(url)
    with pytest.raises(FormatError, match="view 1, block 2"):
        cache.load_view(1)
    assert not (cache.path / "commits/c.1.2.0").exists()
    cache.load_view(0)


def test_fitted_codecs_are_staged_with_their_constants(proxy: FlakyProxy, tmp_path: Path) -> None:
    manifest = tiny_manifest(IMAGES, codec="compact")
    build(tmp_path / "coded.zarr", manifest, IMAGES)
    cache, reference = (
        TeacherCache.open(publish(tmp_path / "coded.zarr", proxy)),
        TeacherCache.open(tmp_path / "coded.zarr"),
    )
    for name in reference.targets:
        np.testing.assert_array_equal(cache.read_array(name, 1), reference.read_array(name, 1))


def test_the_same_cache_built_here_with_other_constants(proxy: FlakyProxy, url: str) -> None:
    """Heads and class embeddings of two machines differ in their last bits, so their blocks are never mixed."""
    mirror = registry.cache_path("tiny", MANIFEST.fingerprint)
    writer = CacheWriter.create(
        mirror, MANIFEST, labels=IMAGES.labels, sample_keys=IMAGES.keys, constants=tiny_constants(MANIFEST, seed=8)
    )
    assert writer.manifest.constants_digest != manifest_at(open_place(url)).constants_digest
    with pytest.raises(MismatchError, match="must not be mixed"):
        TeacherCache.open(url)
    write(writer, tiny_targets(MANIFEST))
    assert TeacherCache.open(url).is_complete
    TeacherCache.open(url).load_view(0)
    assert data_requests(proxy) == []


def test_the_same_cache_here_with_other_block_sizes(proxy: FlakyProxy, url: str) -> None:
    """A complete one is used; into a half-built one nothing can be staged."""
    mirror = registry.cache_path("tiny", MANIFEST.fingerprint)
    other = tiny_manifest(IMAGES, block_rows=32)
    writer = create(mirror, other, IMAGES)
    with pytest.raises(MismatchError, match="in blocks of another size"):
        TeacherCache.open(url)
    write(writer, tiny_targets(other))
    cache = TeacherCache.open(url)
    assert cache.is_complete
    cache.load_view(1)
    assert data_requests(proxy) == []


# Several at once


def test_concurrent_readers_stage_a_view_once(proxy: FlakyProxy, url: str) -> None:
    """Threads of one process, each with its own reader."""
    with ThreadPoolExecutor(4) as pool:
        views = list(pool.map(lambda _: TeacherCache.open(url).load_view(1), range(4)))
    index = np.arange(MANIFEST.num_samples)
    assert all(view.logits(index).equal(views[0].logits(index)) for view in views)
    reads = data_requests(proxy)
    assert len(reads) == len(set(reads)) == 2 * BLOCKS
    assert not list(registry.cache_home().glob("*.claims"))


READ = """
import sys
from cache_tools.reader import TeacherCache
cache = TeacherCache.open(sys.argv[1])
for view in range(cache.num_views):
    print(cache.read_array("fused_logits", view).sum())
"""


@pytest.mark.slow
def test_concurrent_processes_stage_every_block_once(proxy: FlakyProxy, url: str, local: Path) -> None:
    command = [sys.executable, "-c", READ, url]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(outputs)) == 1
    assert len(outputs[0].split()) == VIEWS
    reads = data_requests(proxy)
    assert len(reads) == len(set(reads)) == 2 * VIEWS * BLOCKS
    copied = {file.relative_to(local): file.read_bytes() for file in local.rglob("*") if file.is_file()}
    mirror = registry.cache_path("tiny", MANIFEST.fingerprint)
    assert {file.relative_to(mirror): file.read_bytes() for file in mirror.rglob("*") if file.is_file()} == copied


@pytest.mark.parametrize("requests", [slow(2), 12, slow(24), slow(35)])
def test_a_killed_reader_leaves_no_damage_and_no_lock(proxy: FlakyProxy, url: str, local: Path, requests: int) -> None:
    proxy.stop_after(requests)
    process = subprocess.Popen([sys.executable, "-c", READ, url], stdout=subprocess.DEVNULL)
    assert proxy.full.wait(300)
    process.kill()
    process.wait()
    proxy.go_on()
    mirror = registry.cache_path("tiny", MANIFEST.fingerprint)
    for file in mirror.rglob("[cz]*"):
        if file.is_file() and not file.name.endswith(".partial"):
            assert file.read_bytes() == (local / file.relative_to(mirror)).read_bytes()
    done = {(view, block) for view in range(VIEWS) for block in range(BLOCKS) if _staged(mirror, view, block)}
    proxy.forget()
    cache, reference = TeacherCache.open(url), TeacherCache.open(local)
    for view in range(VIEWS):
        np.testing.assert_array_equal(
            cache.read_array("fused_logits", view), reference.read_array("fused_logits", view)
        )
    assert len(data_requests(proxy)) == 2 * (VIEWS * BLOCKS - len(done))


def _staged(mirror: Path, view: int, block: int) -> bool:
    return (mirror / "commits" / f"c.{view}.{block}.0").exists()


def test_staging_waits_for_a_builder_of_the_same_cache(proxy: FlakyProxy, url: str) -> None:
    """A block that another process of this host computes is not staged."""
    mirror = registry.cache_path("tiny", MANIFEST.fingerprint)
    writer = create(mirror, MANIFEST, IMAGES)
    with Claims(LocalPlace(mirror)) as claims, ThreadPoolExecutor(1) as pool:
        assert claims.claim(BlockId(1, 2))
        loading = pool.submit(lambda: TeacherCache.open(url).load_view(1))
        assert proxy.reached(lambda: len(data_requests(proxy)) >= 2 * (BLOCKS - 1), timeout_s=300)
        write(writer, tiny_targets(MANIFEST), [(1, 2)])
        claims.release(BlockId(1, 2))
        loading.result(timeout=300)
    assert "fused_logits/c.1.2.0" not in data_requests(proxy)


def test_the_record_names_the_url_of_a_mirror(url: str) -> None:
    cache = TeacherCache.open(url + "/")
    record = read_origin(cache.path)
    assert record is not None
    assert (record.url, record.fingerprint, record.views, record.complete) == (url, MANIFEST.fingerprint, VIEWS, False)
    assert cache.is_complete
    assert json.loads((cache.path.parent / f".{cache.path.name}.origin").read_text())["complete"] is True


def test_staging_works_while_a_fifth_of_the_requests_fail(
    proxy: FlakyProxy, url: str, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.fail(0.2)
    cache, reference = TeacherCache.open(url), TeacherCache.open(local)
    for view in cache.complete_views:
        np.testing.assert_array_equal(
            cache.read_array("fused_logits", view), reference.read_array("fused_logits", view)
        )
    assert cache.is_complete
    assert sum(seen.failure is not None for seen in proxy.seen) > 3
