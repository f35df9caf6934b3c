import json
import shutil
from pathlib import Path

import pytest

from cache_tools.errors import FormatError
from cache_tools.integrity.local import repair, verify
from cache_tools.reader import TeacherCache
from cache_tools.store.group import read_manifest
from cache_tools.store.writer import CacheWriter
from tests.support.cache_factory import (
    build,
    create,
    overwrite,
    remove_digests,
    tiny_images,
    tiny_manifest,
    tiny_targets,
    write,
)

IMAGES = tiny_images()
MANIFEST = tiny_manifest(IMAGES)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "cache"
    build(path, MANIFEST, IMAGES)
    return path


@pytest.fixture
def cache(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "cache"))


def flip(file: Path, offset: int, mask: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= mask
    file.write_bytes(data)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_sound_cache_is_sound(sound: Path) -> None:
    found = verify(sound)
    assert found.sound
    assert found.blocks == found.blocks_total == MANIFEST.num_views * MANIFEST.num_blocks
    targets = sum(array.nbytes for array in tiny_targets(MANIFEST).values())
    assert found.bytes > targets


def test_a_half_built_cache_is_sound(tmp_path: Path) -> None:
    writer = create(tmp_path / "cache", MANIFEST, IMAGES)
    write(writer, tiny_targets(MANIFEST), writer.missing_blocks()[:4])
    found = verify(tmp_path / "cache")
    assert (found.sound, found.blocks) == (True, 4)


@pytest.mark.parametrize("store", ["fused", "components"])
def test_every_kind_of_cache_is_sound(tmp_path: Path, store: str) -> None:
    build(tmp_path / "cache", tiny_manifest(IMAGES, store=store, linear_head=False), IMAGES)
    assert verify(tmp_path / "cache").sound


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("fused_logits/c.1.2.0", 10),
        ("fused_features/c.0.0.0", 0),
        ("commits/c.2.4.0", 3),
        ("fused_logits/c.1.2.0", None),
    ],
)
def test_a_truncated_or_missing_file_is_repaired_by_building_its_block(
    sound: Path, cache: Path, name: str, cut: int | None
) -> None:
    file = cache / name
    if cut is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:cut])
    found = verify(cache)
    assert not found.sound
    done = repair(cache, found)
    view, block = (int(part) for part in name.rpartition("/")[2].split(".")[1:3])
    assert done.dropped == ((view, block),)
    assert done.left == ()
    writer = CacheWriter.resume(cache, MANIFEST.fingerprint)
    assert writer.missing_blocks() == [(view, block)]
    write(writer, tiny_targets(MANIFEST))
    assert contents(cache) == contents(sound)
    assert verify(cache).sound


@pytest.mark.parametrize("name", ["fused_logits", "commits", "labels", "class_embeddings"])
@pytest.mark.parametrize("damage", ["gone", "rubbish", "another fill value"])
def test_damaged_metadata_is_rewritten(sound: Path, cache: Path, name: str, damage: str) -> None:
    file = cache / name / "zarr.json"
    if damage == "gone":
        file.unlink()
    elif damage == "rubbish":
        file.write_bytes(b"\x00" * 100)
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"fill_value": 1}))
    found = verify(cache)
    assert not found.sound
    done = repair(cache, found)
    assert (done.rewritten, done.left) == ((f"{name}/zarr.json",), ())
    assert verify(cache).sound
    TeacherCache.open(cache).load_view(0)


@pytest.mark.parametrize("name", ["fused_features", "commits"])
def test_an_array_whose_folder_is_missing_is_restored(sound: Path, cache: Path, name: str) -> None:
    shutil.rmtree(cache / name)
    (cache / "fused_logits/c.0.0.0").write_bytes(b"x")
    done = repair(cache, verify(cache))
    assert done.rewritten == (f"{name}/zarr.json",)
    assert done.dropped == (() if name == "commits" else ((0, 0),))
    repair(cache, verify(cache))  # the array's blocks can be checked only now
    write(CacheWriter.resume(cache, MANIFEST.fingerprint), tiny_targets(MANIFEST))
    assert contents(cache) == contents(sound)


def test_damage_that_only_a_copy_repairs_is_reported(cache: Path) -> None:
    flip(cache / "labels" / "c.0", 5)
    found = verify(cache)
    done = repair(cache, found)
    assert [problem.where for problem in done.left] == [str(cache / "labels")]
    assert not verify(cache).sound


def test_intact_rows_of_another_block_are_found(cache: Path) -> None:
    (cache / "fused_logits/c.1.2.0").write_bytes((cache / "fused_logits/c.1.3.0").read_bytes())
    (problem,) = verify(cache).problems
    assert (problem.view, problem.block) == (1, 2)
    assert problem.what == "stored rows are not those that were committed"


def test_a_cache_that_was_being_grown_is_sound(cache: Path) -> None:
    """Arrays are resized before the manifest is written; a crash between the two leaves longer arrays."""
    manifest = (cache / "zarr.json").read_bytes()
    CacheWriter.resume(cache, MANIFEST.fingerprint).grow(MANIFEST.num_views + 2)
    (cache / "zarr.json").write_bytes(manifest)
    assert verify(cache).sound


@pytest.mark.parametrize("name", ["labels", "class_embeddings"])
def test_a_damaged_array_is_named_with_both_digests(cache: Path, name: str) -> None:
    overwrite(cache, name)
    (problem,) = verify(cache).problems
    assert (problem.where, problem.cure) == (str(cache / name), "copy")
    assert f"the array {name} is damaged" in problem.what
    assert f"expected {read_manifest(cache).array_digests[name]}, found " in problem.what


def test_digests_are_added_to_a_cache_of_an_earlier_version(sound: Path, cache: Path) -> None:
    found = verify(remove_digests(cache))
    assert (found.sound, found.has_digests, found.adds_digests) == (True, False, True)
    done = repair(cache, found)
    assert (done.digests_added, done.rewritten, done.left) == (True, (), ())
    assert read_manifest(cache) == read_manifest(sound)
    assert contents(cache) == contents(sound)
    assert verify(cache).has_digests


def test_no_digests_are_added_to_damaged_arrays(cache: Path) -> None:
    overwrite(remove_digests(cache), "labels")
    found = verify(cache)
    assert (found.sound, found.adds_digests) == (False, False)
    assert not repair(cache, found).digests_added
    assert not verify(cache).has_digests


def test_a_damaged_digest_is_rewritten(sound: Path, cache: Path) -> None:
    group = json.loads((cache / "zarr.json").read_text())
    group["attributes"]["array_digests"]["labels"] = "0" * 32
    (cache / "zarr.json").write_text(json.dumps(group))
    (problem,) = verify(cache).problems
    assert (problem.where, problem.cure) == (str(cache / "zarr.json"), "metadata")
    assert repair(cache, verify(cache)).left == ()
    assert contents(cache) == contents(sound)


def test_a_build_that_grows_a_cache_adds_digests_and_checks_them(sound: Path, cache: Path) -> None:
    grown = CacheWriter.resume(remove_digests(cache), MANIFEST.fingerprint).grow(MANIFEST.num_views + 1)
    assert grown.manifest.array_digests == read_manifest(sound).array_digests
    overwrite(cache, "labels")
    with pytest.raises(FormatError, match="the array labels is damaged"):
        grown.grow(MANIFEST.num_views + 2)


def test_a_build_that_continues_a_cache_adds_digests(sound: Path, cache: Path) -> None:
    done = CacheWriter.resume(remove_digests(cache), MANIFEST.fingerprint).record_digests()
    assert done.manifest == read_manifest(sound)
