"""A cache home that is read-only, that strangers may write to, on a flaky network share, or with few open files."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_tools.errors import CacheError, UnsafeFileError
from cache_tools.files import SafeFolder
from cache_tools.format.commits import BlockId
from cache_tools.home import housekeeping, registry
from cache_tools.integrity.local import verify
from cache_tools.places import LocalPlace
from cache_tools.places.claims import Claims, claims_place
from cache_tools.places.transfer import copy_cache
from cache_tools.reader import TeacherCache
from cache_tools.store.writer import CacheWriter
from tests.support.cache_factory import build, create, tiny_images, tiny_manifest, tiny_targets, write
from tests.support.child import in_child
from tests.support.tiny_build import files_of

IMAGES = tiny_images(40)
MANIFEST = tiny_manifest(IMAGES, num_views=2, block_rows=8)
NAME = f"tiny-{MANIFEST.fingerprint[:12]}.zarr"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    build(home / NAME, MANIFEST, IMAGES)
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(home))
    return home


def without_privileges(function: Callable[[], Any]) -> Any:
    """The result of a function in a process to which permissions apply: root may write everywhere otherwise."""

    def limited() -> Any:
        if os.geteuid() == 0:
            header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            assert ctypes.CDLL(None).capset(header, none) == 0
        return function()

    return in_child(limited)


def refusals(*attempts: Callable[[], Any]) -> list[str]:
    """The messages of the CacheErrors that these raise; None for one that raises nothing."""
    found = []
    for attempt in attempts:
        try:
            attempt()
            found.append("nothing was raised")
        except CacheError as error:
            found.append(str(error))
    return found


def test_a_read_only_home_is_read_and_refuses_to_be_written(home: Path, tmp_path: Path) -> None:
    for path in (home, *home.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before, elsewhere = files_of(home), tmp_path / "elsewhere.zarr"

    def use() -> list[str]:
        cache = TeacherCache.open("tiny")
        cache.load_view(1)
        registry.mark_used(cache.path)
        assert [record.complete for record in registry.list_caches()] == [True]
        assert verify(cache.path).sound
        copy_cache(LocalPlace(cache.path), LocalPlace(elsewhere))
        assert verify(elsewhere).sound
        claims = Claims(LocalPlace(cache.path))
        grown = MANIFEST.model_copy(update={"name": "other"})
        return refusals(
            lambda: housekeeping.remove(cache.path),
            lambda: CacheWriter.resume(cache.path, MANIFEST.fingerprint).grow(3),
            lambda: create(home / "new.zarr", grown, IMAGES),
            lambda: claims.claim(BlockId(0, 0)),
        )

    messages = without_privileges(use)
    for path in (home, *home.rglob("*")):
        path.chmod(0o755)
    assert all("Permission denied" in message and "Fix its permissions" in message for message in messages), messages
    assert files_of(home) == before


@pytest.mark.parametrize("sticky", [False, True])
def test_a_stranger_plants_names_that_we_use(home: Path, tmp_path: Path, sticky: bool) -> None:
    """In a home where anybody may write. Every name that can be guessed leads to a folder of ours, or is a pipe."""
    home.chmod(0o1777 if sticky else 0o777)
    mine = tmp_path / "mine"
    build(mine / "cache.zarr", MANIFEST, IMAGES)
    for name in ("file", f"x.{'0a' * 16}.partial"):
        (mine / name).write_bytes(b"mine")
    before, new = files_of(mine), MANIFEST.model_copy(update={"name": "new"})

    def planted(name: str, target: str | None) -> None:
        place = home / name
        if place.is_symlink() or place.exists():
            shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()
        if target is None:
            os.mkfifo(place)
        else:
            place.symlink_to(mine / target)
        if os.geteuid() == 0:
            os.lchown(place, 65534, 65534)

    uses: dict[str, Callable[[], object]] = {
        f".{NAME}.claims": lambda: Claims(LocalPlace(home / NAME)).claim(BlockId(0, 0)),
        f".{NAME}.used": lambda: registry.mark_used(home / NAME),
        f".{NAME}.origin": lambda: TeacherCache.open("tiny"),
        ".sizes.json": registry.list_caches,
    }
    for target in ("", "cache.zarr", "file", None):
        for name, use in uses.items():
            planted(name, target)
            with pytest.raises(UnsafeFileError, match=r"not a (file|folder) .*; found a (link to|pipe)"):
                use()
            (home / name).unlink()
        for name in (f".{NAME}.{'0b' * 16}.partial", f"{NAME}.{'0b' * 16}.partial"):
            planted(name, target)
            os.utime(home / name, (1, 1), follow_symlinks=False)
        housekeeping.prune(housekeeping.PruneRules(incomplete=True), dry_run=False)
        CacheWriter.resume(home / NAME, MANIFEST.fingerprint)
        planted("new.zarr", target)
        with pytest.raises(CacheError):
            create(home / "new.zarr", new, IMAGES)
        (home / "new.zarr").unlink()
        assert files_of(mine) == before
    assert verify(home / NAME).sound


def test_a_folder_of_claims_of_a_stranger_stops_nobody_from_reading(home: Path) -> None:
    """Claims that were made up expire, and nothing else in their folder is touched."""
    folder = home / f".{NAME}.claims"
    folder.mkdir()
    for name in ("0.0.0", "notes.txt", "99999999999999999999.1.1", "0.0.x", "c.partial"):
        (folder / name).write_bytes(b"[" * 100_000)
        os.utime(folder / name, (1, 1))
    assert verify(home / NAME).sound
    TeacherCache.open("tiny").load_view(0)
    with Claims(LocalPlace(home / NAME)) as claims:
        assert claims.claim(BlockId(0, 0))
    assert {"notes.txt", "0.0.x", "c.partial"} <= set(os.listdir(folder))


def test_a_network_share_with_stale_handles_and_repeated_requests(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Now and then a request finds a stale handle, and each new name is requested twice, as after a lost answer."""
    calls = dict.fromkeys(("open", "stat", "link", "rename"), 0)

    def flaky(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not any(options.get(key) is not None for key in ("dir_fd", "src_dir_fd")):
                return real(*arguments, **options)
            calls[name] += 1
            if calls[name] % 23 == 0:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            answer = real(*arguments, **options)
            return real(*arguments, **options) if name == "link" else answer

        return call

    for name in calls:
        monkeypatch.setattr(os, name, flaky(name, getattr(os, name)))
    copy_cache(LocalPlace(home / NAME), LocalPlace(tmp_path / "copy.zarr"))
    writer = CacheWriter.resume(tmp_path / "copy.zarr", MANIFEST.fingerprint).grow(3)
    targets = tiny_targets(writer.manifest)
    with Claims(LocalPlace(writer.path)) as claims:
        missing = writer.missing_blocks()
        assert sorted(claims.share(missing, set, lambda block: False)) == missing
        write(writer, targets)
    monkeypatch.undo()
    assert min(calls[name] for name in ("open", "stat", "rename")) > 46, calls
    assert calls["link"], calls
    assert verify(writer.path).sound
    cache = TeacherCache.open(writer.path)
    assert cache.is_complete
    assert (cache.read_array("fused_logits", 2) == targets["fused_logits"][2]).all()
    assert not list(claims_place(LocalPlace(writer.path)).entries())


def test_a_share_that_stays_away_is_one_clear_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def stale(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).startswith("c.0.0"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path, *arguments, **options)

    cache = TeacherCache.open("tiny")
    monkeypatch.setattr(os, "open", stale)
    with pytest.raises(CacheError, match=rf"Stale file handle \({home}.*/c\.0\.0.*mount it again"):
        cache.load_view(0)


@pytest.mark.medium
def test_twenty_open_files_are_enough(home: Path, tmp_path: Path) -> None:
    def use() -> bool:
        TeacherCache.open("tiny")  # so that everything is imported
        limit = len(os.listdir("/proc/self/fd")) + 20
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        cache = TeacherCache.open("tiny")
        cache.load_view(0)
        copy_cache(LocalPlace(cache.path), LocalPlace(tmp_path / "copy.zarr"))
        writer = CacheWriter.resume(tmp_path / "copy.zarr", MANIFEST.fingerprint).grow(4)
        write(writer, tiny_targets(writer.manifest))
        return verify(writer.path).sound and verify(cache.path).sound

    assert in_child(use)
    assert SafeFolder(tmp_path / "copy.zarr").is_file("commits/c.3.0.0")
