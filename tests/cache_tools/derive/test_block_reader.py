"""BlockReader gives rows as they were committed, for any range; it finds and names damage."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from cache_tools.derive.block_reader import BlockReader
from cache_tools.errors import FormatError, IncompleteError
from cache_tools.format.commits import BlockId
from cache_tools.reader import TeacherCache
from tests.support.cache_factory import build, create, tiny_images, tiny_manifest, tiny_targets, write

IMAGES = tiny_images()
MANIFEST = tiny_manifest(IMAGES, store="components", linear_head=False, codec="compact")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks") / "c"
    build(folder, MANIFEST, IMAGES)
    return folder


@pytest.fixture
def reader(path: Path) -> BlockReader:
    return BlockReader(TeacherCache.open(path))


def rows_of(reader: BlockReader, view: int, rows: slice) -> dict[str, np.ndarray]:
    cache = reader.cache
    return {a.name: cache.read_stored(a.name, view, rows) for spec in cache.targets.values() for a in spec.arrays}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("size", [16, 1, 7, 10, 32, 33, 75])
def test_rows_of_any_range_are_those_stored(reader: BlockReader, size: int) -> None:
    for view in (0, 2):
        for start in range(0, 75, size):
            rows = slice(start, min(start + size, 75))
            assert reader.holds(view, rows)
            assert_same(reader.read(view, rows), rows_of(reader, view, rows))


def test_threads_may_cut_blocks_at_once(reader: BlockReader) -> None:
    cuts = [(view, slice(start, start + 5)) for view in range(3) for start in range(0, 75, 5)] * 3
    with ThreadPoolExecutor(8) as pool:
        for (view, rows), found in zip(cuts, pool.map(lambda cut: reader.read(*cut), cuts), strict=True):
            assert_same(found, rows_of(reader, view, rows))


def test_decoded_rows_are_those_of_the_reader(reader: BlockReader) -> None:
    decoded = reader.decode(reader.read(1, slice(20, 60)))
    assert set(decoded) == {"teacher_features", "clip_features", "teacher_logits"}
    for name, values in decoded.items():
        np.testing.assert_array_equal(values, reader.cache.read_array(name, 1, slice(20, 60)))
    assert set(reader.decode(reader.read(1, slice(0, 16)), ["clip_features"])) == {"clip_features"}


def test_a_sample_is_its_rows_of_the_view(reader: BlockReader) -> None:
    index = np.array([0, 3, 15, 16, 40, 74])
    whole = rows_of(reader, 1, slice(0, 75))
    assert_same(reader.sample(1, index), {name: values[index] for name, values in whole.items()})


def test_uncommitted_rows_are_not_read(tmp_path: Path) -> None:
    manifest = tiny_manifest(IMAGES)
    write(create(tmp_path / "c", manifest, IMAGES), tiny_targets(manifest), [(0, 0), (0, 1), (1, 4)])
    reader = BlockReader(TeacherCache.open(tmp_path / "c"))
    assert reader.holds(0, slice(3, 32))
    assert reader.holds(1, slice(64, 75))
    assert not reader.holds(0, slice(31, 33))
    assert not reader.holds(2, slice(0, 1))
    assert not reader.holds(7, slice(0, 1))
    assert len(reader.read(0, slice(3, 32))["fused_logits"]) == 29
    for view, rows in ((0, slice(32, 48)), (0, slice(31, 33)), (2, slice(0, 16))):
        with pytest.raises(IncompleteError):
            reader.read(view, rows)
    with pytest.raises(IncompleteError):
        reader.sample(0, np.arange(75))


def damaged_copy(path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy"))


@pytest.mark.parametrize("rows", [slice(16, 32), slice(20, 30)], ids=["whole", "cut"])
def test_a_chunk_in_the_wrong_place_is_found(path: Path, tmp_path: Path, rows: slice) -> None:
    """A sound chunk in the wrong place: only the commit shows it."""
    copy = damaged_copy(path, tmp_path)
    chunks = copy / "clip_features"
    shutil.copy(chunks / "c.1.1.0", chunks / "c.0.1.0")
    reader = BlockReader(TeacherCache.open(copy))
    assert len(reader.read(0, slice(0, 16))["clip_features"]) == 16
    with pytest.raises(FormatError, match=r"clip_features, view 0, block 1.*cache-tools repair"):
        reader.read(0, rows)


def test_a_flipped_byte_is_found(path: Path, tmp_path: Path) -> None:
    copy = damaged_copy(path, tmp_path)
    file = copy / "teacher_logits" / "c.2.0.0"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(FormatError, match="teacher_logits"):
        BlockReader(TeacherCache.open(copy)).read(2, slice(0, 16))


def test_a_commit_of_other_views_is_found(path: Path, tmp_path: Path) -> None:
    copy = damaged_copy(path, tmp_path)
    table = zarr.open_array(copy / "commits", mode="r+")
    row = np.asarray(table[1, 1])
    row[0] ^= np.uint64(2)
    table[1, 1] = row
    assert (copy / BlockId(1, 1).commit_key).is_file()
    with pytest.raises(FormatError, match="commits, view 1, block 1"):
        BlockReader(TeacherCache.open(copy)).read(1, slice(16, 32))


@pytest.mark.parametrize("name", ["clip_features_steps", "class_embeddings"])
def test_constants_of_another_cache_are_found(path: Path, tmp_path: Path, name: str) -> None:
    copy = damaged_copy(path, tmp_path)
    assert name in BlockReader(TeacherCache.open(copy)).constants
    array = zarr.open_array(copy / name, mode="r+")
    array[0] = np.asarray(array[0]) * 2
    with pytest.raises(FormatError, match=f"{name} is damaged.*expected digest"):
        _ = BlockReader(TeacherCache.open(copy)).constants
