import errno
import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import cache_tools.files
from cache_tools.alignment import make_canaries
from cache_tools.errors import CacheError, FormatError, MismatchError, NotFoundError, StorageError
from cache_tools.format import commits
from cache_tools.reader import TeacherCache
from cache_tools.store.writer import CacheWriter
from tests.support.cache_factory import (
    VIEWS,
    build,
    create,
    tiny_constants,
    tiny_images,
    tiny_manifest,
    tiny_targets,
    write,
)

IMAGES = tiny_images()
MANIFEST = tiny_manifest(IMAGES)


def files(path: Path) -> dict[str, bytes]:
    """All files of a cache except the half-written ones of killed processes."""
    found = (file for file in path.rglob("*") if file.is_file() and file.suffix != cache_tools.files.PARTIAL)
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


# Numbers


@pytest.mark.parametrize(("store", "linear_head"), [("fused", True), ("components", True), ("components", False)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_array_reads_as_written(tmp_path: Path, store: str, linear_head: bool, dtype: Any) -> None:
    manifest = tiny_manifest(IMAGES, store=store, linear_head=linear_head, codec=dtype)
    targets = build(tmp_path / "c", manifest, IMAGES)
    cache = TeacherCache.open(tmp_path / "c")
    for name, values in targets.items():
        for view in range(manifest.num_views):
            assert cache.read_stored(name, view).dtype == dtype
            np.testing.assert_array_equal(cache.read_array(name, view), values[view])
    for name, values in tiny_constants(manifest).items():
        np.testing.assert_array_equal(cache.constant(name), values)
    np.testing.assert_array_equal(cache.labels, IMAGES.labels)
    np.testing.assert_array_equal(cache.sample_keys, IMAGES.keys)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"provenance": {"command": "build-cache caf\udce9"}}, "provenance.command"),
        ({"build_recipe": {"teacher": [{"name": "a"}, {"name": "\ud800"}]}}, "build_recipe.teacher.1.name"),
        ({"name": "half\udfff"}, "name"),
    ],
)
def test_text_that_cannot_be_read_back_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    with pytest.raises(FormatError, match=rf"not Unicode.*\({key} of the manifest\)"):
        create(tmp_path / "c", MANIFEST.model_copy(update=change), IMAGES)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CacheWriter]:
    folder = tmp_path_factory.mktemp("round-trip")
    return {
        dtype: create(folder / dtype, tiny_manifest(IMAGES, codec=dtype), IMAGES) for dtype in ("float16", "float32")
    }


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.float32, (16, 5), elements=st.floats(-65504, 65504, width=32)),
    st.sampled_from(["float16", "float32"]),
    st.sampled_from([np.float32, np.float64]),
)
def test_round_trip_error_is_bounded(
    writers: dict[str, CacheWriter], values: np.ndarray, dtype: str, rows_dtype: type
) -> None:
    """float32 is exact. float16 rounds by half a unit in the last place: 2⁻¹¹ of the number, 2⁻²⁵ if subnormal."""
    writer = writers[dtype]
    features: np.ndarray = np.zeros((16, 8), dtype=rows_dtype)
    writer.write_block(1, 2, {"fused_logits": values.astype(rows_dtype), "fused_features": features}, 5)
    read = TeacherCache.open(writer.path).read_array("fused_logits", 1, writer.manifest.block(2))
    error = np.abs(read.astype(np.float64) - values)
    bound = np.maximum(np.abs(values) * 2.0**-11, 2.0**-25) if dtype == "float16" else 0.0
    assert (error <= bound).all()


def test_all_zero_and_short_blocks_are_stored(tmp_path: Path) -> None:
    writer = create(tmp_path / "c", MANIFEST, IMAGES)
    last = MANIFEST.num_blocks - 1
    rows = MANIFEST.block(last).stop - MANIFEST.block(last).start
    assert rows == 11
    zeros = {"fused_logits": np.zeros((rows, 5), np.float32), "fused_features": np.zeros((rows, 8), np.float32)}
    writer.write_block(0, last, zeros, 1)
    assert (TeacherCache.open(tmp_path / "c").read_array("fused_logits", 0, MANIFEST.block(last)) == 0).all()


def test_commits_hold_the_parameter_digest_and_the_digest_of_each_array(tmp_path: Path) -> None:
    targets = build(tmp_path / "c", MANIFEST, IMAGES)
    table = zarr.open_array(tmp_path / "c" / "commits", mode="r")
    rows = MANIFEST.block(3)
    parameters = MANIFEST.recipe.views.parameter_digest(np.arange(rows.start, rows.stop), 2, (32, 32))
    expected = [parameters, *(commits.block_digest(targets[n][2, rows]) for n in ("fused_logits", "fused_features"))]
    assert np.asarray(table[2, 3]).tolist() == expected
    assert table.attrs["columns"] == ["view_parameters", "fused_logits", "fused_features"]


def test_digests_do_not_depend_on_memory_layout_and_are_never_zero() -> None:
    values = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    assert commits.block_digest(values) == commits.block_digest(np.asfortranarray(values))
    assert commits.block_digest(values) == commits.block_digest(values.astype(">f4"))
    assert commits.block_digest(values) != commits.block_digest(values[::-1])
    assert commits.block_digest(np.zeros((1, 1), np.float16)) != 0


def test_threads_write_distinct_blocks_at_once(tmp_path: Path) -> None:
    targets = tiny_targets(MANIFEST)
    writer = create(tmp_path / "c", MANIFEST, IMAGES)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda block: write(writer, targets, [block]), writer.missing_blocks()))
    build(tmp_path / "plain", MANIFEST, IMAGES)
    assert files(tmp_path / "c") == files(tmp_path / "plain")


# What must not be written


@pytest.mark.parametrize(
    ("value", "rows", "dtype", "message"),
    [
        (65520.0, "float64", "float16", "samples 32–47, row 3, column 2.*expected within ±65504; found 65520.*float32"),
        (np.inf, "float16", "float16", "samples 32–47, row 3, column 2.*within ±65504; found inf.*Store float32"),
        (np.nan, "float64", "float16", "samples 32–47, row 3, column 2.*found nan.*weights"),
        (-np.inf, "float64", "float32", "samples 32–47, row 3, column 2.*found -inf"),
        (1e39, "float64", "float32", "samples 32–47, row 3, column 2.*found 1e\\+39"),
    ],
)
def test_numbers_out_of_range_are_named_and_nothing_is_written(
    tmp_path: Path, value: float, rows: str, dtype: Any, message: str
) -> None:
    manifest = tiny_manifest(IMAGES, codec=dtype)
    writer = create(tmp_path / "c", manifest, IMAGES)
    before = files(tmp_path / "c")
    logits = np.zeros((16, 5), rows)
    logits[3, 2] = value
    with pytest.raises(FormatError, match=message):
        writer.write_block(1, 2, {"fused_logits": logits, "fused_features": np.zeros((16, 8))}, 1)
    assert files(tmp_path / "c") == before


@pytest.mark.parametrize(
    ("changes", "view", "block"),
    [
        ({}, 3, 0),
        ({}, -1, 0),
        ({}, 0, 5),
        ({"fused_logits": np.zeros((15, 5), np.float32)}, 0, 0),
        ({"fused_logits": np.zeros((16, 6), np.float32)}, 0, 0),
        ({"fused_logits": np.zeros((16, 5), np.int64)}, 0, 0),
        ({"teacher_logits": np.zeros((16, 5), np.float32)}, 0, 0),
    ],
)
def test_blocks_that_the_cache_does_not_have_are_refused(
    tmp_path: Path, changes: dict[str, np.ndarray], view: int, block: int
) -> None:
    writer = create(tmp_path / "c", MANIFEST, IMAGES)
    block_arrays = {"fused_logits": np.zeros((16, 5), np.float32), "fused_features": np.zeros((16, 8), np.float32)}
    with pytest.raises(FormatError):
        writer.write_block(view, block, {**block_arrays, **changes}, 1)
    assert len(writer.missing_blocks()) == 15


def test_create_refuses_samples_and_constants_that_do_not_fit_the_manifest(tmp_path: Path) -> None:
    good: dict[str, Any] = {"labels": IMAGES.labels, "sample_keys": IMAGES.keys, "constants": tiny_constants(MANIFEST)}
    swapped = IMAGES.labels.copy()
    swapped[0] = (swapped[0] + 1) % 5
    nan = {**good["constants"], "class_embeddings": np.full((5, 10), np.nan, np.float32)}
    changes: list[dict[str, Any]] = [
        {"labels": swapped},
        {"sample_keys": IMAGES.keys[:-1]},
        {"constants": {}},
        {"constants": nan},
    ]
    for bad in changes:
        with pytest.raises(FormatError):
            CacheWriter.create(tmp_path / "c", MANIFEST, **{**good, **bad})
    assert list(tmp_path.iterdir()) == []


# Create and resume


def test_create_uses_an_empty_folder_and_touches_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert len(create(tmp_path / "empty", MANIFEST, IMAGES).missing_blocks()) == 15
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("empty", "mine", "file"):
        with pytest.raises(StorageError, match="taken"):
            create(tmp_path / name, MANIFEST, IMAGES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "mine"]


def test_another_process_may_create_the_same_cache_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cache_tools.store import writer as module

    def slow_sync(folder: Path) -> None:
        monkeypatch.undo()
        write(create(tmp_path / "c", MANIFEST, IMAGES), tiny_targets(MANIFEST), [(0, 0)])

    monkeypatch.setattr(module, "sync_tree", slow_sync)
    assert len(create(tmp_path / "c", MANIFEST, IMAGES).missing_blocks()) == 14
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_resume_refuses_another_recipe_and_other_folders(tmp_path: Path) -> None:
    build(tmp_path / "c", MANIFEST, IMAGES)
    other = tiny_manifest(IMAGES, codec="float32")
    with pytest.raises(MismatchError, match=f"expected fingerprint {other.fingerprint[:12]}"):
        CacheWriter.resume(tmp_path / "c", other.fingerprint)
    with pytest.raises(NotFoundError):
        CacheWriter.resume(tmp_path / "nowhere", MANIFEST.fingerprint)
    with pytest.raises(FormatError, match="not a teacher cache"):
        CacheWriter.resume(tmp_path, MANIFEST.fingerprint)


def test_old_leftovers_are_removed(tmp_path: Path) -> None:
    writer = create(tmp_path / "c", MANIFEST, IMAGES)
    cache, end = tmp_path / "c", f"{'0a' * 16}.partial"
    old = [cache / "commits" / f"c.0.0.0.{end}", tmp_path / f".c.{end}", cache / f"z.{end}"]
    young = cache / "commits" / f"c.0.0.1.{end}"
    foreign = tmp_path / f".d.{end}"
    old[1].mkdir()
    (old[1] / "labels").write_text("half")
    for path in (old[0], old[2], young, foreign):
        path.write_text("half")
    for path in (*old, foreign):
        os.utime(path, (time.time() - 2 * cache_tools.files.LEFTOVER_AGE_S,) * 2)
    CacheWriter.resume(writer.path, MANIFEST.fingerprint)
    assert not any(path.exists() for path in old)
    assert young.exists()
    assert foreign.exists()


def test_every_write_is_flushed_and_the_commit_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = create(tmp_path / "c", MANIFEST, IMAGES)
    events: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, os.rename

    def name_of(descriptor: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path / "c")

    def fsync(descriptor: int) -> None:
        events.append(("fsync", name_of(descriptor)))
        real_fsync(descriptor)

    def rename(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        events.append(("rename", f"{name_of(dst_dir_fd)}/{target}"))
        real_rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    write(writer, tiny_targets(MANIFEST), [(1, 2)])
    steps = [(kind, name.split(".")[0] if kind == "fsync" else name) for kind, name in events]
    assert steps == [
        step
        for name in ("fused_logits", "fused_features", "commits")
        for step in (("fsync", f"{name}/c"), ("rename", f"{name}/c.1.2.0"), ("fsync", name))
    ]


# Growing


def test_growing_adds_views_and_keeps_the_others(tmp_path: Path) -> None:
    targets = build(tmp_path / "c", MANIFEST, IMAGES)
    before = files(tmp_path / "c")
    reader = TeacherCache.open(tmp_path / "c")
    writer = CacheWriter.resume(tmp_path / "c", MANIFEST.fingerprint)
    assert writer.grow(2) is writer
    grown = writer.grow(5)
    assert grown.missing_blocks() == [(view, block) for view in (3, 4) for block in range(5)]
    wider = tiny_manifest(IMAGES, num_views=5)
    write(grown, tiny_targets(wider))
    cache = TeacherCache.open(tmp_path / "c")
    assert cache.complete_views == (0, 1, 2, 3, 4)
    np.testing.assert_array_equal(cache.read_array("fused_logits", 1), targets["fused_logits"][1])
    np.testing.assert_array_equal(cache.read_array("fused_logits", 4), tiny_targets(wider)["fused_logits"][4])
    after = files(tmp_path / "c")
    assert all(after[name] == data for name, data in before.items() if not name.endswith("zarr.json"))
    np.testing.assert_array_equal(reader.load_view(0).arrays["fused_logits"], targets["fused_logits"][0])


def test_a_writer_opened_before_a_cache_grew_removes_no_views(tmp_path: Path) -> None:
    create(tmp_path / "c", MANIFEST, IMAGES)
    first, late, later = (CacheWriter.resume(tmp_path / "c", MANIFEST.fingerprint) for _ in range(3))
    first.grow(8, canaries=make_canaries(VIEWS, IMAGES, 8, first=3), note={"views": [3, 8]})
    before = files(tmp_path / "c")
    assert late.grow(5, note={"views": [3, 5]}).manifest.num_views == 8
    assert files(tmp_path / "c") == before
    manifest = later.grow(9, canaries=make_canaries(VIEWS, IMAGES, 9, first=3), note={"views": [3, 9]}).manifest
    assert [note["views"] for note in manifest.provenance["grown"]] == [[3, 8], [3, 9]]
    places = [(canary.view, canary.index) for canary in manifest.canaries]
    assert {view for view, _ in places} == set(range(9))
    assert len(set(places)) == len(places)


def test_a_cache_opens_after_interrupted_growth_and_can_grow_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "c", MANIFEST, IMAGES)
    writer = CacheWriter.resume(tmp_path / "c", MANIFEST.fingerprint)

    def cut(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(zarr.Group, "update_attributes", cut)
    with pytest.raises(KeyboardInterrupt):
        writer.grow(5)
    monkeypatch.undo()
    assert TeacherCache.open(tmp_path / "c").is_complete
    writer = CacheWriter.resume(tmp_path / "c", MANIFEST.fingerprint)
    assert writer.missing_blocks() == []
    assert len(writer.grow(5).missing_blocks()) == 10


# Read-only disks; tests/system covers full ones

_ON_TMPFS = """
    import os
    import subprocess
    import sys
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from tests.support.cache_factory import build, create, tiny_images, tiny_manifest, tiny_targets, write
    from cache_tools.errors import StorageError
    from cache_tools.reader import TeacherCache
    from cache_tools.store.writer import CacheWriter

    path = Path(sys.argv[1])
    images = tiny_images(800)
    manifest = tiny_manifest(images, num_views=4, codec="float32", canaries=False)
    targets = tiny_targets(manifest)
    {body}
"""
_READ_ONLY = """
    writer = create(path / "c", manifest, images)
    write(writer, targets, [(0, 0)])
    subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
    cache = TeacherCache.open(path / "c")
    rows = manifest.block(0)
    assert (cache.read_array("fused_logits", 0, rows) == targets["fused_logits"][0, rows]).all()
    for attempt in (
        lambda: write(writer, targets, [(0, 1)]),
        lambda: create(path / "d", manifest, images),
        lambda: writer.grow(9),
    ):
        try:
            attempt()
            sys.exit("written to a read-only disk")
        except StorageError as error:
            assert "Read-only file system" in str(error), error
    assert len(CacheWriter.resume(path / "c", manifest.fingerprint).missing_blocks()) == 199
    print("complete")
"""


def run_on_tmpfs(folder: Path, body: str, size: str) -> str:
    """Run code with a small file system mounted at `folder`, in a mount namespace of its own process."""
    root = str(Path(__file__).parents[3])
    code = textwrap.dedent(_ON_TMPFS).format(root=root, body=textwrap.dedent(body))
    probe = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(folder)], capture_output=True)
    if probe.returncode:
        pytest.skip("no mount namespaces here")
    shell = f'mount -t tmpfs -o size={size} none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", shell, "sh", str(folder), sys.executable, code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.medium
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux mount namespaces")
def test_a_cache_on_a_read_only_disk_can_be_read_but_not_written(tmp_path: Path) -> None:
    assert run_on_tmpfs(tmp_path, _READ_ONLY, "4m") == "complete\n"


def test_storage_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = create(tmp_path / "c", MANIFEST, IMAGES)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=f"Input/output error .*{tmp_path}"):
        write(writer, tiny_targets(MANIFEST), [(0, 0)])
    monkeypatch.undo()
    assert len(writer.missing_blocks()) == 15
    assert not list((tmp_path / "c").rglob("*.partial"))


def test_removing_a_damaged_commit_repairs_the_cache(tmp_path: Path) -> None:
    targets = build(tmp_path / "c", MANIFEST, IMAGES)
    commit = tmp_path / "c" / "commits" / "c.1.2.0"
    commit.write_bytes(commit.read_bytes()[:-3])
    writer = CacheWriter.resume(tmp_path / "c", MANIFEST.fingerprint)
    with pytest.raises(CacheError, match=f"damaged commit \\({commit}\\).*Remove this file"):
        writer.missing_blocks()
    commit.unlink()
    assert writer.missing_blocks() == [(1, 2)]
    write(writer, targets)
    assert TeacherCache.open(tmp_path / "c").is_complete
