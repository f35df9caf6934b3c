import shutil
from pathlib import Path

import numpy as np
import pytest

from cache_tools.errors import FormatError, NotFoundError, RecipeError
from cache_tools.format.manifest import Manifest
from cache_tools.home import registry
from cache_tools.places import open_place
from cache_tools.reader import TeacherCache
from tests.support.cache_factory import build, create, tiny_images, tiny_manifest, tiny_targets, write

IMAGES = tiny_images()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache home, and an empty working directory."""
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def add(name: str, *, blocks: list[tuple[int, int]] | None = None, **kind: object) -> Manifest:
    """A cache in the home, complete unless `blocks` are given."""
    manifest = tiny_manifest(IMAGES, name=name, canaries=False, **kind)  # type: ignore[arg-type]
    path = registry.cache_path(name, manifest.fingerprint)
    if blocks is None:
        build(path, manifest, IMAGES)
    else:
        write(create(path, manifest, IMAGES), tiny_targets(manifest), blocks)
    return manifest


def test_the_home_is_the_variable_or_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path))
    assert registry.cache_home() == tmp_path
    assert registry.cache_path("digits", "0123456789abcdef") == tmp_path / "digits-0123456789ab.zarr"
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for empty in (
        lambda: monkeypatch.setenv("TEACHER_CACHE_HOME", ""),
        lambda: monkeypatch.delenv("TEACHER_CACHE_HOME"),
    ):
        empty()
        assert registry.cache_home() == tmp_path / "me" / ".cache" / "teacher-cache"


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "a b", "ü"])
def test_names_are_plain_file_names(home: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="bad cache name"):
        registry.cache_path(name, "0" * 64)


def test_a_home_that_does_not_exist_has_no_caches(home: Path) -> None:
    assert registry.list_caches() == []
    with pytest.raises(NotFoundError, match=r"no such cache \(digits\).*`build-cache` makes more"):
        TeacherCache.open("digits")


def test_the_list_describes_every_cache(home: Path) -> None:
    complete = add("two")
    half = add("one", codec="float32", blocks=[(1, block) for block in range(5)] + [(2, 0)])
    (home / "three-000000000000.zarr" / "labels").mkdir(parents=True)
    (home / "empty-000000000000.zarr").mkdir()
    (home / ".four-1.zarr.1.partial").mkdir()
    (home / "datasets").mkdir()
    one, three, two = registry.list_caches()
    assert (one.name, one.fingerprint, one.views_done, one.views_total) == ("one", half.fingerprint, 1, 3)
    assert not one.complete
    assert (two.name, two.fingerprint, two.views_done, two.complete) == ("two", complete.fingerprint, 3, True)
    assert (two.dataset, two.teacher, two.clip) == ("digits/train", "tiny_teacher", "tiny_clip")
    assert two.size_bytes == sum(file.stat().st_size for file in two.path.rglob("*") if file.is_file())
    assert two.modified_s == max(file.stat().st_mtime for file in two.path.rglob("*") if file.is_file())
    assert three.problem is not None
    assert "not a teacher cache" in three.problem
    assert not three.complete


def test_complete_views_agree_with_the_reader(home: Path) -> None:
    rng = np.random.default_rng(0)
    pairs = [(view, block) for view in range(3) for block in range(5)]
    manifest = tiny_manifest(IMAGES, canaries=False)
    path = registry.cache_path("c", manifest.fingerprint)
    writer = create(path, manifest, IMAGES)
    for number in rng.permutation(15):
        write(writer, tiny_targets(manifest), [pairs[number]])
        assert tuple(registry.read_complete_views(path, manifest)) == TeacherCache.open(path).complete_views


def test_caches_are_found_by_name_fingerprint_or_path(home: Path) -> None:
    manifest = add("digits")
    path = registry.cache_path("digits", manifest.fingerprint)
    prefix = manifest.fingerprint
    for reference in ("digits", prefix[:4], prefix[:12].upper(), prefix, f"digits-{prefix[:6]}", str(path), path):
        assert TeacherCache.open(reference).path == path
    relative = Path("copy")
    shutil.copytree(path, relative)
    assert TeacherCache.open("copy").path == relative
    for reference in (prefix[:3], "digits-", "digit-" + prefix[:6], prefix[:8] + "0" * 8):
        with pytest.raises(NotFoundError):
            registry.resolve(reference)


def test_a_name_is_preferred_to_a_folder_that_is_no_cache(home: Path) -> None:
    manifest = add("digits")
    Path("digits").mkdir()
    assert TeacherCache.open("digits").manifest == manifest
    with pytest.raises(FormatError, match="not a teacher cache"):
        TeacherCache.open(Path("digits"))


def test_a_name_is_preferred_to_a_fingerprint(home: Path) -> None:
    one = add("one")
    two = add(one.fingerprint[:4], codec="float32")
    assert registry.find(one.fingerprint[:4]).fingerprint == two.fingerprint


def test_of_several_matches_the_only_complete_cache_is_found(home: Path) -> None:
    half = add("digits", codec="float32", blocks=[(0, 0)])
    complete = add("digits")
    assert registry.find("digits").fingerprint == complete.fingerprint
    assert registry.find(half.fingerprint[:6]).fingerprint == half.fingerprint
    another = add("digits", store="components")
    with pytest.raises(NotFoundError, match="several caches match") as caught:
        registry.find("digits")
    for manifest, views in ((half, "0/3"), (complete, "3/3"), (another, "3/3")):
        assert f"{manifest.fingerprint[:12]} ({views} views)" in str(caught.value)


def test_an_unknown_reference_gives_an_error_with_advice(home: Path) -> None:
    add("digits")
    with pytest.raises(NotFoundError, match=r"Did you mean digits; otherwise `cache-tools ls` lists"):
        registry.find("digts")
    with pytest.raises(NotFoundError, match=r"Run `cache-tools ls`"):
        registry.find("0bad" * 3)
    with pytest.raises(NotFoundError, match=r"no cache here \(some/where\).*a name: digits"):
        registry.resolve("some/where")
    with pytest.raises(NotFoundError, match=r"no cache here \(x\.zarr\)"):
        registry.resolve("x.zarr")


def test_listing_a_missing_folder_is_an_error(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    for path in (tmp_path / "nowhere", file):
        with pytest.raises(NotFoundError, match="no such folder"):
            registry.list_caches(path)


def test_a_local_path_ends_in_a_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files beside a cache are named after it."""
    path = registry.cache_path("digits", add("digits").fingerprint)
    monkeypatch.chdir(path)
    assert registry.resolve(".") == registry.resolve(Path()) == TeacherCache.open("./").path == path
    with pytest.raises(NotFoundError, match="no such cache"):
        registry.resolve("")
    monkeypatch.chdir(path / "labels")
    assert registry.resolve("..") == registry.resolve("../labels/..") == path
    assert open_place("..").name == path.name


@pytest.mark.parametrize("url", ["s3://bucket/digits.zarr", "https://host/digits.zarr", "gs://bucket/c"])
def test_remote_caches_have_no_folder(home: Path, url: str) -> None:
    with pytest.raises(NotFoundError, match=rf"needs a cache on a local disk.*`cache-tools pull {url}`"):
        registry.resolve(url)


def test_a_file_url_is_a_path(home: Path) -> None:
    path = registry.cache_path("digits", add("digits").fingerprint)
    assert TeacherCache.open(f"file://{path}").path == path
