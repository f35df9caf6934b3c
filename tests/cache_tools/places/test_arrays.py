"""Metadata, labels, sample keys and constants are checked when a cache is copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cache_tools.cli import app
from cache_tools.errors import FormatError
from cache_tools.format.digests import whole_arrays
from cache_tools.integrity.local import verify
from cache_tools.places import LocalPlace
from cache_tools.places.arrays import damaged_metadata
from cache_tools.places.metadata import manifest_at
from cache_tools.places.transfer import copy_cache
from cache_tools.reader import TeacherCache
from cache_tools.store.writer import CacheWriter
from tests.support.cache_factory import build, overwrite, remove_digests, tiny_images, tiny_manifest

pytestmark = pytest.mark.medium

IMAGES = tiny_images(20)
MANIFEST = tiny_manifest(IMAGES, store="components", num_views=2, canaries=False)
ARRAYS = whole_arrays(MANIFEST)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "cache.zarr"
    build(path, MANIFEST, IMAGES)
    return path


@pytest.fixture
def cache(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "cache.zarr"))


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def flip(path: Path, name: str) -> None:
    file = next((path / name).glob("c.*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def remove(path: Path, name: str) -> None:
    next((path / name).glob("c.*")).unlink()


def change_metadata(path: Path, name: str) -> None:
    file = path / name / "zarr.json"
    file.write_text(file.read_text().replace('"dimension_names"', '"dimension_nam"'))


CASES: list[tuple[Callable[[Path, str], None], str]] = [
    *((overwrite, name) for name in ("labels", "sample_keys", "teacher_head_weight")),
    (flip, "labels"),
    (remove, "text_features"),
    (change_metadata, "class_embeddings"),
]


@pytest.mark.parametrize(("damage", "name"), CASES, ids=[f"{damage.__name__} {name}" for damage, name in CASES])
def test_a_damaged_array_is_not_copied_and_is_restored(
    sound: Path, cache: Path, tmp_path: Path, damage: Callable[[Path, str], None], name: str
) -> None:
    damage(cache, name)
    before, target = contents(cache), tmp_path / "target.zarr"
    with pytest.raises(FormatError, match=name):
        copy_cache(LocalPlace(cache), LocalPlace(target))
    assert not (target / "zarr.json").exists()
    assert contents(cache) == before
    done = copy_cache(LocalPlace(sound), LocalPlace(cache))
    assert (done.restored, done.blocks) == ((name,), 0)
    assert verify(cache).sound
    assert contents(cache).keys() == contents(sound).keys()
    TeacherCache.open(cache).check_arrays()


def test_an_error_names_the_array_and_both_digests(cache: Path, tmp_path: Path) -> None:
    expected = manifest_at(LocalPlace(cache)).array_digests["labels"]
    overwrite(cache, "labels")
    done = CliRunner().invoke(app, ["copy", str(cache), str(tmp_path / "target.zarr")])
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert f"the array labels is damaged: its digest is not the stored one ({cache}/labels)" in line
    assert f"expected digest {expected}; found " in line
    assert "cache-tools pull" in line


def test_pull_restores_what_is_damaged(sound: Path, cache: Path) -> None:
    overwrite(cache, "class_embeddings")
    done = CliRunner().invoke(app, ["pull", str(sound), "--out", str(cache)])
    assert done.exit_code == 0, done.stderr
    assert "damaged at the target, replaced: class_embeddings" in done.stdout
    assert verify(cache).sound


def test_two_damaged_copies_stay_as_they_are(cache: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(cache, tmp_path / "other.zarr"))
    overwrite(cache, "labels")
    flip(other, "teacher_head_weight")
    before = contents(cache)
    with pytest.raises(FormatError, match="teacher_head_weight"):
        copy_cache(LocalPlace(other), LocalPlace(cache))
    assert contents(cache) == before


@pytest.mark.parametrize("name", ["labels", "teacher_projection"])
def test_caches_of_earlier_versions_are_checked_by_the_digests_they_have(
    sound: Path, cache: Path, tmp_path: Path, name: str
) -> None:
    old = remove_digests(Path(shutil.copytree(cache, tmp_path / "old.zarr")))
    copy_cache(LocalPlace(old), LocalPlace(tmp_path / "copied.zarr"))
    assert contents(tmp_path / "copied.zarr") == contents(old)
    overwrite(old, name)
    with pytest.raises(FormatError, match=f"one of the arrays .*{name}.* expected digest"):
        copy_cache(LocalPlace(old), LocalPlace(tmp_path / "target.zarr"))
    assert not (tmp_path / "target.zarr" / "zarr.json").exists()
    assert name in copy_cache(LocalPlace(sound), LocalPlace(old)).restored
    assert verify(old).sound
    assert not manifest_at(LocalPlace(old)).array_digests


def test_a_damaged_digest_is_restored(sound: Path, cache: Path) -> None:
    group = json.loads((cache / "zarr.json").read_text())
    group["attributes"]["array_digests"]["labels"] = "0" * 32
    (cache / "zarr.json").write_text(json.dumps(group))
    assert list(damaged_metadata(LocalPlace(cache), manifest_at(LocalPlace(cache)))) == ["zarr.json"]
    assert copy_cache(LocalPlace(sound), LocalPlace(cache)).restored == ("zarr.json",)
    assert verify(cache).sound


def test_a_block_of_another_view_is_not_copied(cache: Path, tmp_path: Path) -> None:
    """Sound files, and their commit with them."""
    for file in cache.glob("*/c.1.*.0"):
        if file.parent.name not in ARRAYS:
            file.with_name(file.name.replace("c.1.", "c.0.", 1)).write_bytes(file.read_bytes())
    with pytest.raises(FormatError, match="view parameters are not those of the recipe"):
        copy_cache(LocalPlace(cache), LocalPlace(tmp_path / "target.zarr"))


def test_new_views_are_not_copied_from_a_cache_with_other_digests(cache: Path, tmp_path: Path) -> None:
    target = LocalPlace(tmp_path / "target.zarr")
    copy_cache(LocalPlace(cache), target)
    CacheWriter.resume(cache, MANIFEST.fingerprint).grow(3)
    group = json.loads((cache / "zarr.json").read_text())
    group["attributes"]["array_digests"]["labels"] = "0" * 32
    (cache / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(FormatError, match="digests of labels, sample keys or constants differ"):
        copy_cache(LocalPlace(cache), target)
    assert verify(target.path).sound
